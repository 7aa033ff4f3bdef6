// The page's wiring: what is chosen, dropped, pasted or drawn goes to the worker, and its predictions into the page.

import { card, resultButton, showError, showPredictions, showResult, showWaiting } from "./display.mjs";
import { prepareDigit } from "./digit.mjs";
import { Pad } from "./pad.mjs";
import { askTorchServe, predictionUrl } from "./torchserve.mjs";

const find = (id) => document.getElementById(id);
const HERE = "In this page";
const THERE = "TorchServe";

let labels; // of the loaded model
let model = ""; // its name, by which TorchServe knows it too
let items = []; // what is classified: {name, file: Blob or a promise of it, pixels?: RGB of a drawing, outcome?, button?}
let shown; // the one of them that is shown with all its bars
let turn = 0; // a response to anything but the latest question is dropped

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
    model = name.replace(/(\.pixels)?\.onnx$/, "");
    showPad(isOfDigits(spec));
    showServer();
    setStatus(`${name} is ready (onnxruntime-web ${version}).`);
    await classify();
  } catch (error) {
    setStatus(`${name}: ${error.message}`, true);
  }
}

// Drawings are prepared as the images of the data set "digits" were: not for any folder of that name.
function isOfDigits({ trained_on, labels }) {
  return Boolean(trained_on?.startsWith("digits,")) && labels.join() === "0,1,2,3,4,5,6,7,8,9";
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
  for (const item of items) item.outcome = undefined;
  showShown();
  if (!labels) return;
  askServer();
  for (const [i, item] of items.entries()) {
    const outcome = await classifyHere(item.pixels ?? item.file);
    if (mine !== turn) return;
    item.outcome = outcome;
    if (item.button) {
      showResult(item.button, outcome);
      find("progress").textContent = `${i + 1} of ${items.length} images`;
    }
    if (item === shown) showShown();
  }
}

/** @returns {Promise<{predictions: [string, number][], note: string} | {error: string}>} */
async function classifyHere(image) {
  try {
    const { probabilities, width, height, decoding, running } = await ask("classify", image);
    const predictions = labels.map((label, i) => [label, probabilities[i]]).sort((a, b) => b[1] - a[1]);
    const parts = `decoding ${decoding.toFixed(1)}, graph ${running.toFixed(1)}`;
    return { predictions, note: `${(decoding + running).toFixed(1)} ms (${parts}), ${width}×${height} px` };
  } catch (error) {
    return { error: error.message };
  }
}

function showShown() {
  const place = find("page-predictions");
  if (!shown) showWaiting(place, "Nothing classified yet.");
  else if (!labels) showWaiting(place, "Choose a model first.");
  else if (!shown.outcome) showWaiting(place, "…");
  else if (shown.outcome.error) showError(place, HERE, shown.outcome.error);
  else showPredictions(place, HERE, shown.outcome.predictions, shown.outcome.note);
  // On a phone the predictions for a file may be out of sight. While one draws nothing may move.
  if (shown?.url && shown.outcome) find("result").scrollIntoView({ block: "nearest" });
}

async function askServer() {
  const [place, item, mine] = [find("server-predictions"), shown, turn];
  if (!item || !find("compare").checked) return showWaiting(place, "");
  showWaiting(place, `${THERE}: …`);
  const isLatest = () => item === shown && mine === turn;
  try {
    const { predictions, milliseconds } = await askTorchServe(await item.file, model, find("server-key").value);
    if (isLatest()) showPredictions(place, THERE, predictions, `${milliseconds.toFixed(1)} ms, there and back`);
  } catch (error) {
    if (isLatest()) showError(place, THERE, error.message);
  }
}

// Images: chosen, dropped, pasted.

function takeImages(files) {
  clearDrawing();
  const taken = files.map((file) => ({ name: file.name, file, url: URL.createObjectURL(file) }));
  if (taken.length > 1)
    for (const item of taken) {
      item.button = resultButton(item.name, item.url);
      item.button.addEventListener("click", () => (show(item), showShown(), askServer()));
    }
  return setItems(taken);
}

/** What is classified from now on, in the place of what was. */
function setItems(next) {
  for (const { url } of items) URL.revokeObjectURL(url);
  items = next;
  find("progress").textContent = "";
  find("results").replaceChildren(...items.flatMap(({ button }) => button?.parentElement ?? []));
  show(items[0]);
  return classify();
}

/** Makes an item the one that is shown in full. */
function show(item) {
  shown?.button?.removeAttribute("aria-current");
  shown = item;
  shown?.button?.setAttribute("aria-current", "true");
  const preview = find("preview");
  preview.hidden = !item?.url;
  if (item?.url) Object.assign(preview, { src: item.url, alt: item.name });
  else preview.removeAttribute("src");
}

function take(files) {
  const models = files.filter(({ name }) => name.endsWith(".onnx"));
  const images = files.filter((file) => !models.includes(file));
  if (images.length) takeImages(images);
  if (models.length) loadModel(models[0].name, models[0]);
}

for (const id of ["model-file", "image-file"])
  find(id).addEventListener("change", ({ target }) => {
    const files = [...target.files];
    target.value = ""; // so that the same file can be chosen again
    if (files.length) id === "model-file" ? loadModel(files[0].name, files[0]) : takeImages(files);
  });

addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
addEventListener("dragleave", () => find("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  take([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => take([...event.clipboardData.files]));
find("preview").addEventListener("error", () => (find("preview").hidden = true));
find("preview").addEventListener("load", ({ target }) => target.classList.toggle("tiny", target.naturalWidth < 64));

// Drawings.

const pad = new Pad(find("pad"), (strokes) => {
  const pixels = prepareDigit(strokes);
  setItems([{ pixels, file: asPng(pixels) }]); // not awaited here: what comes in between would be overwritten
});

function showPad(isThere) {
  find("drawing").hidden = !isThere;
  if (!isThere && shown?.pixels) takeImages([]); // which clears the drawing
}

function clearDrawing() {
  pad.clear();
  find("seen").hidden = true;
}

find("clear").addEventListener("click", () => (shown?.pixels ? takeImages([]) : clearDrawing()));

/** The pixels as a file for TorchServe; shown beside the predictions too, as what the model sees. */
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
  find("server").hidden = find("server-predictions").hidden = !find("compare").checked;
  find("server-url").textContent = predictionUrl(model || "NAME").href;
}

find("compare").addEventListener("change", () => (showServer(), askServer()));
find("server").addEventListener("submit", (event) => {
  event.preventDefault();
  askServer();
});
showServer();

const address = new URLSearchParams(location.search).get("model");
if (address) loadModel(address.split("/").at(-1), fetchModel(address));
