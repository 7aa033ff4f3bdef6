// Classifies image files with an exported ONNX file, in Node. The labels come out of the file.
//
//     node clients/node/classify.mjs runs/digits/export/digits.pixels.onnx IMAGE [IMAGE …]
//
// Prints a line of JSON for each image. Ends with 1 if any could not be classified, with 2 if none could be tried.

import { readFile } from "node:fs/promises";

import { readSpec } from "./metadata.mjs";

process.env.ORT_DISABLE_TELEMETRY = "1"; // ONNX Runtime reads it when it is loaded

const BEST = 5;

async function main([path, ...images]) {
  if (!path || !images.length) throw new Error("usage: node classify.mjs MODEL.pixels.onnx IMAGE [IMAGE …]");
  const classify = await load(path);
  let failed = 0;
  for (const image of images) {
    const name = `"image": ${JSON.stringify(image)}`;
    try {
      console.log(`{${name}, "predictions": ${best(await classify(await readFile(image)))}}`);
    } catch (error) {
      failed += 1;
      console.log(`{${name}, "error": ${JSON.stringify(firstLine(error))}}`);
    }
  }
  return failed ? 1 : 0;
}

/** @returns a function from the bytes of an image file to [label, probability] of each class, best first */
async function load(path) {
  const { InferenceSession, Tensor } = await import("onnxruntime-node");
  const { decode } = await import("./images.mjs");
  const bytes = await readFile(path);
  const { labels, colour } = readSpec(bytes);
  const session = await InferenceSession.create(bytes);
  const [input] = session.inputMetadata;
  if (input.type !== "uint8" || typeof input.shape[1] === "number")
    throw new Error(`${path} does not take whole images; take NAME.pixels.onnx`);
  return async (body) => {
    const { data, height, width } = await decode(body, colour);
    const images = new Tensor("uint8", data, [1, height, width, 3]);
    const { probabilities } = await session.run({ images });
    return labels.map((label, i) => [label, probabilities.data[i]]).sort((a, b) => b[1] - a[1]);
  };
}

/** As JSON text: an object would move labels that are numbers, such as the digits', to the front. */
function best(prediction) {
  const entries = prediction.slice(0, BEST).map(([label, probability]) => `${JSON.stringify(label)}: ${probability}`);
  return `{${entries.join(", ")}}`;
}

function firstLine(error) {
  return error.message.split("\n")[0];
}

try {
  process.exitCode = await main(process.argv.slice(2));
} catch (error) {
  const missing = error.code === "ERR_MODULE_NOT_FOUND";
  console.error(`classify.mjs: ${missing ? "first run: npm ci --prefix clients/node" : firstLine(error)}`);
  process.exitCode = 2;
}
