// What travels in an ONNX file beside its graph: neither onnxruntime-node nor onnxruntime-web shows it.
//
// An ONNX file is a protobuf message, ModelProto; its field 14, metadata_props, repeats entries of a key (field 1) and
// a value (field 2). All other fields, the weights among them, are skipped by their length: nothing is copied.
// https://github.com/onnx/onnx/blob/main/onnx/onnx.proto

const METADATA_PROPS = 14;
const LENGTH_DELIMITED = 2;

/**
 * The spec of a model, as export/graphs/onnx.py writes it.
 * @param {Uint8Array} bytes of the ONNX file
 * @throws {Error} not an ONNX file, or one without a usable spec
 */
export function readSpec(bytes) {
  const text = readMetadata(bytes).get("spec");
  if (text === undefined) throw new Error("the file carries no spec; take one that `python -m export` wrote");
  const spec = JSON.parse(text);
  if (!Array.isArray(spec?.labels) || !spec.labels.every((label) => typeof label === "string"))
    throw new Error("the file's spec has no labels; take one that `python -m export` wrote");
  return spec;
}

/** @returns {Map<string, string>} the file's metadata_props */
export function readMetadata(bytes) {
  const metadata = new Map();
  for (const [field, entry] of fields(bytes)) {
    if (field !== METADATA_PROPS) continue;
    const texts = new Map([...fields(entry)].map(([key, value]) => [key, new TextDecoder().decode(value)]));
    metadata.set(texts.get(1) ?? "", texts.get(2) ?? "");
  }
  return metadata;
}

/** Number and bytes of each length-delimited field of a message; the others are stepped over. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; at < bytes.length; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale; // not `<<`, which ends at 32 bits
      if (byte < 128) return value;
    }
    throw new Error("not an ONNX file, or one that is cut short");
  };
  while (at < bytes.length) {
    const tag = varint();
    const wire = tag % 8;
    const length = { 0: () => (varint(), 0), 1: () => 8, [LENGTH_DELIMITED]: varint, 5: () => 4 }[wire]?.();
    if (length === undefined || at + length > bytes.length)
      throw new Error("not an ONNX file, or one that is cut short");
    if (wire === LENGTH_DELIMITED) yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
    at += length;
  }
}
