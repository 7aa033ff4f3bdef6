// From an image file to the pixels that the pixel graph takes, as predictor/pillow_preprocessing.py makes them with Pillow.

import sharp from "sharp";

// Only what the server reads too, and sharp can: no SVG, PDF or HEIC, whose readers are large.
sharp.block({ operation: ["VipsForeignLoad"] });
sharp.unblock({ operation: ["Jpeg", "Png", "Webp", "Nsgif", "Tiff"].map((kind) => `VipsForeignLoad${kind}`) });

const MAX_PIXELS = 50_000_000; // as the server's handler has it; checked in the header, before anything is decoded
const MAX_PROFILE = 4 << 20; // bytes; the server ignores larger ones

// Of the pixels as sharp calls them: the colour space of a profile that fits, and where sharp is to apply it.
const PROFILED = {
  srgb: ["RGB ", "srgb"],
  rgb16: ["RGB ", "srgb"],
  "b-w": ["GRAY", "b-w"],
  grey16: ["GRAY", "b-w"], // 8-bit first: sharp leaves 16-bit grey unconverted
  cmyk: ["CMYK", "last"], // sharp's default, where the pixels stay what they are
};

/**
 * The first frame as upright 8-bit RGB: transparency on white, 16-bit grey scaled to 8, CMYK converted.
 * A colour profile is applied by sharp's own LittleCMS, which is within a grey level of Pillow's.
 * @param {Buffer} body a JPEG, PNG, WebP, GIF or TIFF file
 * @param {string} [colour] of the spec: "srgb" where an embedded colour profile counts; else it is ignored
 * @returns {Promise<{data: Uint8Array, height: number, width: number}>} data: (height, width, 3)
 * @throws {Error} it is none of these, is damaged, or has too many pixels
 */
export async function decode(body, colour) {
  if (!body.length) throw new Error("the file is empty");
  const options = { autoOrient: true, failOn: "error", limitInputPixels: false };
  const { space, depth, width, height, icc } = await sharp(body, options).metadata();
  if (width * height > MAX_PIXELS)
    throw new Error(`${width}×${height} px is too large: at most ${MAX_PIXELS / 1e6} megapixels are accepted`);
  if (depth !== "uchar" && depth !== "ushort") throw new Error(`pixels of the type ${depth} have no agreed white`);
  const [profile, place] = PROFILED[space] ?? [];
  const converts = colour === "srgb" && icc?.length <= MAX_PROFILE && icc.toString("latin1", 16, 20) === profile;
  const unconverted = { cmyk: ["cmyk", fromCmyk], grey16: ["grey16", fromGrey16] }[space];
  const [colours, toRgb] = (!converts && unconverted) || ["srgb", fromSrgb];
  const { data, info } = await sharp(body, { ...options, ignoreIcc: !converts })
    .pipelineColourspace(converts ? place : colours)
    .toColourspace(colours)
    .raw({ depth: colours === "grey16" ? "ushort" : "uchar" })
    .toBuffer({ resolveWithObject: true });
  return { data: toRgb(data, info.channels, info.width * info.height), height: info.height, width: info.width };
}

function fromSrgb(data, channels, pixels) {
  if (channels === 3) return data;
  return fill(pixels, (i, c) => onWhite(data[4 * i + c], data[4 * i + 3], 255));
}

/** Pillow's rule, without profiles: the colour's complement times black's. */
function fromCmyk(data, channels, pixels) {
  return fill(pixels, (i, c) => {
    const white = 255 - data[channels * i + 3];
    return white - Math.round((white * data[channels * i + c]) / 255);
  });
}

function fromGrey16(data, channels, pixels) {
  const values = new Uint16Array(data.buffer, data.byteOffset, channels * pixels);
  return fill(pixels, (i) => {
    const grey = values[channels * i];
    return Math.round((channels === 2 ? onWhite(grey, values[2 * i + 1], 65535) : grey) / 257);
  });
}

function onWhite(value, alpha, white) {
  return Math.round((value * alpha + white * (white - alpha)) / white);
}

function fill(pixels, level) {
  const rgb = new Uint8Array(3 * pixels);
  for (let i = 0; i < pixels; i++) for (let c = 0; c < 3; c++) rgb[3 * i + c] = level(i, c);
  return rgb;
}
