// onnxruntime-web as this folder uses it: its plain WebAssembly build, one thread, all files from here.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more would need cross-origin isolation, which a plain file server does not give

export const version = ort.env.versions.web ?? ort.env.versions.common;

/** @param {Uint8Array} bytes of an ONNX file */
export function createSession(bytes) {
  return ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
}

/** Runs a graph of one input and one output. @returns its output tensor */
export async function run(session, type, data, shape) {
  const result = await session.run({ [session.inputNames[0]]: new ort.Tensor(type, data, shape) });
  return result[session.outputNames[0]];
}
