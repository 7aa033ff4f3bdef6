// Asks TorchServe through this page's own origin, where clients/web/serve.py forwards to it.
//
// Not directly: TorchServe demands its key of a browser's preflight request too, which by the standard carries none,
// and so refuses every call from another origin, whatever its cors_… settings say.

const MILLISECONDS = 30_000;

export function predictionUrl(model) {
  return new URL(`/predictions/${encodeURIComponent(model)}`, location.href);
}

/**
 * @param {Blob} image an image file
 * @returns {Promise<{predictions: [string, number][], milliseconds: number}>} labels and probabilities, best first
 * @throws {Error} it refused, or is not there
 */
export async function askTorchServe(image, model, key) {
  if (!model || !key) throw new Error(model ? "type the inference key (from key_file.json)" : "choose a model first");
  const started = performance.now();
  const reply = await fetch(predictionUrl(model), {
    method: "POST",
    headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/octet-stream" },
    body: image,
    credentials: "omit",
    redirect: "error",
    signal: AbortSignal.timeout(MILLISECONDS),
  });
  const body = await reply.json().catch(() => undefined);
  const milliseconds = performance.now() - started;
  if (!body) throw new Error("this page's server does not forward to TorchServe; use clients/web/serve.py");
  if (!reply.ok) throw new Error(`${reply.status} ${body.type}: ${body.message}`);
  return { predictions: Object.entries(body).sort((a, b) => b[1] - a[1]), milliseconds };
}
