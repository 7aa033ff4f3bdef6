// How predictions and the model's card are shown. All text goes in as text: labels come from a file anybody may send.

const BEST = 5;

/** @param {[string, number][]} predictions labels and probabilities, best first */
export function showPredictions(place, who, predictions, time) {
  const [[label, probability]] = predictions;
  fill(place, `${who}: ${label}, ${percent(probability)}`, predictions.slice(0, BEST).map(bar), time);
}

export function showError(place, who, message) {
  fill(place, `${who}: ${message}`, [], "");
  place.classList.add("error");
}

export function showWaiting(place, message) {
  fill(place, message, [], "");
}

/**
 * One of several images, to be put into a list.
 * @returns {HTMLButtonElement} within its list item
 */
export function resultButton(name, url) {
  const button = element("button");
  const thumbnail = element("img");
  Object.assign(button, { type: "button", title: name });
  Object.assign(thumbnail, { loading: "lazy", decoding: "async", alt: "", src: url });
  thumbnail.addEventListener("error", () => (thumbnail.hidden = true));
  button.append(thumbnail, element("span", name, "name"), element("span", "…", "label"), element("span", "", "percent"));
  element("li").append(button);
  return button;
}

/** @param {{predictions?: [string, number][], error?: string}} outcome goes to its button */
export function showResult(button, { predictions: [[label, probability]] = [[]], error }) {
  button.classList.toggle("error", Boolean(error));
  button.querySelector(".label").textContent = error ?? label;
  button.querySelector(".percent").textContent = error ? "" : percent(probability);
}

/** @returns the entries of a definition list: what the spec says of its model */
export function card(spec) {
  const { metrics = {} } = spec;
  const tested = metrics.images ? ` of ${metrics.images.toLocaleString("en")} test images` : "";
  return Object.entries({
    Labels: `${spec.labels.length}: ${spec.labels.join(", ")}`,
    "Trained on": spec.trained_on || "not said",
    Accuracy: "accuracy" in metrics ? percent(metrics.accuracy) + tested : "not measured",
    "Calibration error": "ece" in metrics ? percent(metrics.ece) : "not measured",
    Temperature: spec.temperature,
    Network: `${spec.arch}, ${spec.width ?? spec.size}×${spec.height ?? spec.size} px`, // version 1 of the spec has a size,
    "Weights (SHA-256)": spec.weights_sha256 || "not said",
  }).flatMap(([name, value]) => [element("dt", name), element("dd", value)]);
}

function bar([label, probability]) {
  const item = element("li");
  const track = element("span", "", "track");
  const share = element("span", "", "share");
  share.style.setProperty("--share", probability);
  track.append(share);
  item.append(element("span", label, "label"), track, element("span", percent(probability), "percent"));
  return item;
}

function fill(place, headline, bars, note) {
  place.classList.remove("error");
  place.querySelector(".headline").textContent = headline;
  place.querySelector(".bars").replaceChildren(...bars);
  place.querySelector(".quiet").textContent = note;
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}
