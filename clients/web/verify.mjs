// What verify.py runs in a browser: an ONNX file on batches, each fetched from its server and answered to it.

import { readNpy, writeNpy } from "./npy.mjs";
import { createSession, run, version } from "./runtime.mjs";

/**
 * @param {string[]} names of the .npy files
 * @returns {Promise<{version: string, seconds: number} | {error: string}>} error: the runtime's own reason
 */
export async function verify(names) {
  let seconds = 0;
  try {
    const session = await createSession(new Uint8Array(await read("/model")));
    for (const [i, name] of names.entries()) {
      const { type, data, shape } = readNpy(await read(`/inputs/${encodeURIComponent(name)}`));
      if (i === 0) await run(session, type, data, shape); // the first call compiles
      const started = performance.now();
      const output = await run(session, type, data, shape);
      seconds += (performance.now() - started) / 1000;
      await post(`/outputs/${encodeURIComponent(name)}`, writeNpy(output.data, output.dims));
    }
  } catch (error) {
    return { error: String(error?.message ?? error) };
  }
  return { version, seconds };
}

async function read(path) {
  return (await checked(await fetch(path))).arrayBuffer();
}

async function post(path, body) {
  await checked(await fetch(path, { method: "POST", body }));
}

function checked(reply) {
  if (!reply.ok) throw new Error(`${reply.url}: ${reply.status} ${reply.statusText}`);
  return reply;
}
