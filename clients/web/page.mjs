// The page's wiring: what is chosen, dropped, pasted or drawn goes to the worker, and its answer into the page.

import { card, showAnswer, showError, showWaiting } from "./answer.mjs";
import { prepareDigit } from "./digit.mjs";
import { Pad } from "./pad.mjs";
import { askTorchServe, predictionUrl } from "./torchserve.mjs";

const find = (id) => document.getElementById(id);
const HERE = "In this page";
const THERE = "TorchServe";

// Nearly all of scikit-learn's sevens have the bar; no preparation makes a model know what it has hardly seen.
const ITS_DIGITS = "In this model's data a seven has a bar across its stem, and a one has no foot.";
const NO_DIGITS = "Drawings are prepared for models of `train.py --data digits`; this is another.";

let labels; // of the loaded model
let current; // what is classified: {file: Blob or a promise of it, pixels?: RGB of a drawing}
let turn = 0; // an answer to anything but the latest question is dropped

// The worker, as a function.

const worker = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });
const waiting = new Map();
let asked = 0;

function ask(task, value) {
  return new Promise((resolve, reject) => {
    const id = asked++;
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, task, value });
  });
}

worker.addEventListener("message", ({ data: { id, result, error } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
});

worker.addEventListener("error", () => {
  const message = "the runtime cannot be loaded; first run: npm ci --prefix clients/web";
  for (const { reject } of waiting.values()) reject(new Error(message));
  waiting.clear();
  setStatus(message, true);
});

// The model.

async function loadModel(name, file) {
  setStatus(`Loading ${name} …`);
  try {
    const { spec, version } = await ask("load", await file);
    labels = spec.labels;
    find("card-entries").replaceChildren(...card(spec));
    find("card").hidden = false;
    find("pad-note").textContent = spec.trained_on?.startsWith("digits,") ? ITS_DIGITS : NO_DIGITS;
    find("server-model").value ||= name.split(".")[0];
    setStatus(`${name} is ready (onnxruntime-web ${version}).`);
    if (current) await classify();
  } catch (error) {
    setStatus(`${name}: ${error.message}`, true);
  }
}

async function fetchModel(address) {
  const url = new URL(address, location.href);
  if (url.origin !== location.origin) throw new Error("a model must come from this page's own origin");
  const reply = await fetch(url);
  if (!reply.ok) throw new Error(`${reply.status} ${reply.statusText}`);
  return reply.blob();
}

function setStatus(text, failed = false) {
  find("model-status").textContent = text;
  find("model-status").classList.toggle("error", failed);
}

// The question.

async function classify() {
  const mine = ++turn;
  const { file, pixels } = current;
  await Promise.all([classifyHere(pixels ?? file, mine), find("compare").checked && compare(file, mine)]);
}

async function classifyHere(picture, mine) {
  const place = find("page-answer");
  if (!labels) return showWaiting(place, "Choose a model first.");
  try {
    const { probabilities, width, height, decoding, running } = await ask("classify", picture);
    if (mine !== turn) return;
    const answer = labels.map((label, i) => [label, probabilities[i]]).sort((a, b) => b[1] - a[1]);
    const parts = `decoding ${decoding.toFixed(1)}, graph ${running.toFixed(1)}`;
    showAnswer(place, HERE, answer, `${(decoding + running).toFixed(1)} ms (${parts}), ${width}×${height} px`);
  } catch (error) {
    if (mine === turn) showError(place, HERE, error.message);
  }
}

async function compare(file, mine) {
  const place = find("server-answer");
  showWaiting(place, `${THERE}: …`);
  try {
    const [model, key] = ["server-model", "server-key"].map((id) => find(id).value);
    const { answer, milliseconds } = await askTorchServe(await file, model, key);
    if (mine === turn) showAnswer(place, THERE, answer, `${milliseconds.toFixed(1)} ms, there and back`);
  } catch (error) {
    if (mine === turn) showError(place, THERE, error.message);
  }
}

// Pictures: chosen, dropped, pasted.

function takePicture(file) {
  const preview = find("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.hidden = false;
  clearDrawing();
  current = { file };
  return classify();
}

function take(file) {
  return file.name.endsWith(".onnx") ? loadModel(file.name, file) : takePicture(file);
}

for (const id of ["model-file", "picture-file"])
  find(id).addEventListener("change", ({ target }) => {
    const [file] = target.files;
    target.value = ""; // so that the same file can be chosen again
    if (file) id === "model-file" ? loadModel(file.name, file) : takePicture(file);
  });

addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
addEventListener("dragleave", () => find("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  [...event.dataTransfer.files].forEach(take);
});
addEventListener("paste", (event) => [...event.clipboardData.files].forEach(take));
find("preview").addEventListener("error", () => (find("preview").hidden = true));

// Drawings.

const pad = new Pad(find("pad"), (strokes) => {
  const pixels = prepareDigit(strokes);
  find("preview").hidden = true;
  current = { pixels, file: asPng(pixels) }; // not awaited here: what comes in between would be overwritten
  classify();
});

function clearDrawing() {
  pad.clear();
  find("seen").hidden = true;
}

find("clear").addEventListener("click", () => {
  clearDrawing();
  if (!current?.pixels) return;
  current = undefined;
  turn += 1;
  showWaiting(find("page-answer"), "Nothing classified yet.");
  showWaiting(find("server-answer"), "");
});

/** The pixels as a file for TorchServe; shown beside the pad too, as what the model sees. */
function asPng({ data, height, width }) {
  const canvas = find("seen");
  const image = new ImageData(width, height);
  image.data.forEach((_, i) => (image.data[i] = i % 4 === 3 ? 255 : data[3 * (i >> 2) + (i % 4)]));
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.hidden = false;
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

// TorchServe.

function showServer() {
  find("server").hidden = find("server-answer").hidden = !find("compare").checked;
  find("server-url").textContent = predictionUrl(find("server-model").value || "NAME").href;
}

find("compare").addEventListener("change", showServer);
find("server-model").addEventListener("input", showServer);
find("server").addEventListener("submit", (event) => {
  event.preventDefault();
  if (current) classify();
});
showServer();

const address = new URLSearchParams(location.search).get("model");
if (address) loadModel(address.split("/").at(-1), fetchModel(address));
