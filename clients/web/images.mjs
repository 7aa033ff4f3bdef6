// From an image file to the pixels that the pixel graph takes: in a worker, without a document.

const MAX_PIXELS = 50_000_000; // as the server's handler has it

/**
 * The first frame as upright 8-bit RGB, transparency on white, as in training.
 * @param {Blob} file
 * @param {string} [colour] of the spec: "srgb" where an embedded colour profile counts; else it is ignored
 * @returns {Promise<{data: Uint8Array, height: number, width: number}>} data: (height, width, 3)
 * @throws {Error} the browser cannot read it, or it has too many pixels
 */
export async function decode(file, colour) {
  const image = await createImageBitmap(file, {
    colorSpaceConversion: colour === "srgb" ? "default" : "none",
    premultiplyAlpha: "none",
    imageOrientation: "from-image",
  }).catch(() => {
    throw new Error("the browser cannot read this as an image; it may be damaged or of another kind");
  });
  const { width, height } = image;
  if (width * height > MAX_PIXELS)
    throw new Error(`${width}×${height} px is too large: at most ${MAX_PIXELS / 1e6} megapixels are accepted`);
  const context = new OffscreenCanvas(width, height).getContext("2d", { alpha: false, willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(image, 0, 0);
  image.close();
  return { data: withoutAlpha(context.getImageData(0, 0, width, height).data), height, width };
}

function withoutAlpha(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    rgb[to] = rgba[from];
    rgb[to + 1] = rgba[from + 1];
    rgb[to + 2] = rgba[from + 2];
  }
  return rgb;
}
