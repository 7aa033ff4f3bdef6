// NumPy's file format, version 1.0, as far as verification needs it: C order, float32 or uint8.
// https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

const MAGIC = "\x93NUMPY\x01\x00";
const TYPES = { "<f4": ["float32", Float32Array], "|u1": ["uint8", Uint8Array] };

/**
 * @param {ArrayBuffer} buffer of a .npy file
 * @returns {{type: "float32" | "uint8", shape: number[], data: Float32Array | Uint8Array}}
 */
export function readNpy(buffer) {
  const latin1 = (start, length) => String.fromCharCode(...new Uint8Array(buffer, start, length));
  if (buffer.byteLength < 10 || latin1(0, 8) !== MAGIC) throw new Error("not a .npy file of version 1.0");
  const length = new DataView(buffer).getUint16(8, true);
  const header = latin1(10, length);
  const descr = header.match(/'descr': '([^']*)'/)?.[1];
  const shape = header.match(/'shape': \(([\d, ]*)\)/)?.[1].split(",").filter((text) => text.trim()).map(Number);
  if (!(descr in TYPES) || !shape || !header.includes("'fortran_order': False"))
    throw new Error(`a .npy file must be C-ordered float32 or uint8, not ${header.trim()}`);
  const [type, View] = TYPES[descr];
  const count = shape.reduce((product, side) => product * side, 1);
  if (buffer.byteLength !== 10 + length + count * View.BYTES_PER_ELEMENT)
    throw new Error(`a .npy file of shape (${shape.join(", ")}) is cut short or too long`);
  return { type, shape, data: new View(buffer, 10 + length) }; // NumPy pads its header to 64 bytes, so this is aligned
}

/** @returns {Uint8Array} a .npy file of the float32 values */
export function writeNpy(data, shape) {
  const dictionary = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`;
  const header = dictionary.padEnd(64 * Math.ceil((dictionary.length + 11) / 64) - 11) + "\n";
  const file = new Uint8Array(10 + header.length + data.byteLength);
  file.set([...(MAGIC + "\0\0" + header)].map((letter) => letter.charCodeAt(0)));
  new DataView(file.buffer).setUint16(8, header.length, true);
  file.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), 10 + header.length);
  return file;
}
