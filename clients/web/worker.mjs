// Holds the model, so that the page stays responsive while it loads and runs. Answers each message with one.

import { readSpec } from "./metadata.mjs";
import { decode } from "./images.mjs";
import { createSession, run, version } from "./runtime.mjs";

let session, colour;

const tasks = {
  /** @param {Blob} file of a pixel graph */
  async load(file) {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const spec = readSpec(bytes);
    const loaded = await createSession(bytes);
    const [input] = loaded.inputMetadata;
    if (input.type !== "uint8" || typeof input.shape[1] === "number") {
      await loaded.release();
      throw new Error("it does not take whole images; choose NAME.pixels.onnx");
    }
    const { size, height = size, width = size } = spec; // version 1 of the spec has a size
    await run(loaded, "uint8", new Uint8Array(3 * height * width), [1, height, width, 3]); // the first call compiles
    await session?.release();
    session = loaded;
    colour = spec.colour;
    return { spec, version };
  },

  /** @param {Blob | {data: Uint8Array, height: number, width: number}} image a file, or RGB pixels */
  async classify(image) {
    const started = performance.now();
    const { data, height, width } = image instanceof Blob ? await decode(image, colour) : image;
    const decoded = performance.now();
    const output = await run(session, "uint8", data, [1, height, width, 3]);
    const probabilities = Array.from(output.data);
    return { probabilities, width, height, decoding: decoded - started, running: performance.now() - decoded };
  },
};

onmessage = async ({ data: { id, task, value } }) => {
  try {
    postMessage({ id, result: await tasks[task](value) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
};
