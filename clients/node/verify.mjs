// Runs an ONNX file on batches in .npy files, for `python -m export` to compare with PyTorch.
//
//     node clients/node/verify.mjs MODEL.onnx IN_DIR OUT_DIR
//
// The last line of output is {"version": …, "seconds": …}: of the runtime, and spent in its own call. Ends with 2 on
// wrong usage, with 3 if the runtime is not installed and with 4 if it cannot run the graph; each with a line that says
// so.

import { readFile, readdir, writeFile } from "node:fs/promises";
import { join } from "node:path";

import { readNpy, writeNpy } from "./npy.mjs";

process.env.ORT_DISABLE_TELEMETRY = "1"; // ONNX Runtime reads it when it is loaded

class Failure extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

async function main(args) {
  if (args.length !== 3) throw new Failure(2, "usage: node verify.mjs MODEL.onnx IN_DIR OUT_DIR");
  const [model, inputs, outputs] = args;
  const names = (await orFail(2, readdir(inputs))).filter((name) => name.endsWith(".npy")).sort();
  const ort = await orFail(3, import("onnxruntime-node"), "npm ci --prefix clients/node");
  const session = await orFail(4, ort.InferenceSession.create(model));
  let seconds = 0;
  for (const [i, name] of names.entries()) {
    const { type, data, shape } = await orFail(2, read(join(inputs, name)));
    const feeds = { [session.inputNames[0]]: new ort.Tensor(type, data, shape) };
    if (i === 0) await orFail(4, session.run(feeds)); // the first call of a session prepares its memory
    const started = performance.now();
    const result = await orFail(4, session.run(feeds));
    seconds += (performance.now() - started) / 1000;
    const output = result[session.outputNames[0]];
    await orFail(2, writeFile(join(outputs, name), writeNpy(output.data, output.dims)));
  }
  console.log(JSON.stringify({ version: ort.env.versions.node, seconds }));
}

async function read(path) {
  const file = await readFile(path);
  return readNpy(file.buffer.slice(file.byteOffset, file.byteOffset + file.length));
}

async function orFail(code, promise, message) {
  try {
    return await promise;
  } catch (error) {
    throw new Failure(code, message ?? error.message.replaceAll("\n", " "));
  }
}

try {
  await main(process.argv.slice(2));
} catch (error) {
  if (!(error instanceof Failure)) throw error;
  console.error(error.message);
  process.exitCode = error.code;
}
