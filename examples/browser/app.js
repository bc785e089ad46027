// The page: a photograph in, the exits that it passed and the time out.

import { EarlyExitModel, RUNTIME } from "./early_exit.js";
import { preprocess, readPixels } from "./preprocess.js";

const ROUNDS = 5; // runs of each kind that a time is the median of
const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const setWidth = (bar, share) => (bar.style.width = `${100 * share}%`);
const milliseconds = (time) => `${time.toFixed(1)} ms`;

let model;
let photograph; // its pixel values, and what every exit predicts for it
let busy = false;
let waiting; // what to do next: the network runs one image at a time

/** Classify with the thresholds of the slider: a new photograph, or the one that is shown. */
async function update(blob) {
  waiting = { blob: blob ?? waiting?.blob };
  if (busy) return;
  busy = true;
  page.main.ariaBusy = true;
  while (waiting) {
    const { blob } = waiting;
    waiting = undefined;
    try {
      if (blob) await open(await blob);
      await classify();
      page.status.hidden = true;
    } catch (error) {
      showError(error);
    }
  }
  busy = false;
  page.main.ariaBusy = false;
}

function showError(error) {
  page.status.textContent = error.message;
  page.status.className = "error";
  page.status.hidden = false;
}

// What is computed

async function open(blob) {
  const pixels = await readPixels(blob).catch(() => {
    throw new Error("The browser cannot read this file as an image.");
  });
  const pixelValues = preprocess(pixels, model.config);
  const exits = [];
  for (let exit = 0; exit < model.numExits; exit++) {
    exits.push(await model.run(pixelValues, model.stoppingAt(exit)));
  }
  photograph = { pixelValues, exits };
  URL.revokeObjectURL(page.photo.src);
  page.photo.src = URL.createObjectURL(blob);
  page.photo.hidden = page.result.hidden = false;
}

/** Run with the thresholds of the slider, and to the final exit, in turn. */
async function classify() {
  const thresholds = model.shifted(Number(page.shift.value));
  const [early, full] = [[], []];
  for (let round = 0; round < ROUNDS; round++) {
    early.push(await model.run(photograph.pixelValues, thresholds));
    full.push(await model.run(photograph.pixelValues, model.stoppingAt(model.numExits - 1)));
  }
  showExits(early[0], thresholds);
  showTimes(median(early), median(full));
}

function median(runs) {
  return runs.map((run) => run.milliseconds).sort((a, b) => a - b)[Math.floor(runs.length / 2)];
}

// What is shown

function showExits({ exit: taken, label, confidence }, thresholds) {
  const final = model.numExits - 1;
  page.prediction.textContent = `${label}, ${percent(confidence)}`;
  const isEarly = taken < final;
  page.decision.textContent = isEarly
    ? `Stops at exit ${taken}; the final one is exit ${final}.`
    : `Runs to the final exit, exit ${final}.`;
  page.exits.replaceChildren(
    ...photograph.exits.map((prediction, exit) => exitRow(exit, exit <= taken && prediction, thresholds[exit], taken)),
  );
}

/** Return a row of the list; `prediction` is false for an exit that is not reached. */
function exitRow(exit, prediction, threshold, taken) {
  const row = page.exit.content.cloneNode(true).firstElementChild;
  const part = (name) => row.querySelector(name);
  row.className = exit === taken ? "taken" : prediction ? "passed" : "unreached";
  part(".name").textContent = `Exit ${exit}`;
  part(".label").textContent = prediction ? prediction.label : "not run";
  if (prediction) {
    part(".confidence").textContent = percent(prediction.confidence);
    setWidth(part(".bar i"), prediction.confidence);
  }
  part(".note").textContent = threshold === undefined ? "final exit" : `threshold ${threshold.toFixed(2)}`;
  if (model.config.criterion === "confidence" && threshold <= 1) {
    part(".bar em").hidden = false;
    part(".bar em").style.left = `${100 * threshold}%`;
  }
  return row;
}

function showTimes(early, full) {
  const longest = Math.max(early, full);
  page["early-time"].textContent = milliseconds(early);
  page["full-time"].textContent = milliseconds(full);
  setWidth(page["early-bar"], early / longest);
  setWidth(page["full-bar"], full / longest);
  page.comparison.textContent =
    `Early exit takes ${percent(early / full)} of the time of the same file run to its final exit. ` +
    `Median of ${ROUNDS} runs each, in turn, without reading and resizing the photograph.`;
}

function showShift() {
  const shift = Number(page.shift.value);
  const meaning = shift < 0 ? "exits earlier" : shift > 0 ? "exits later" : "as exported";
  page.shifted.textContent = `${shift < 0 ? "−" : "+"}${Math.abs(shift).toFixed(2)}, ${meaning}`;
}

// Input

function listen() {
  page.file.addEventListener("change", () => page.file.files.length && update(page.file.files[0]));
  page.shift.addEventListener("input", () => {
    showShift();
    update();
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // or the browser opens the photograph instead of the page
      page.drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) update(event.dataTransfer.files[0]);
    });
  }
}

function addSample(path) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  image.src = path;
  image.alt = path.replace(/^.*\/|\.\w+$/g, "");
  button.append(image);
  button.addEventListener("click", () => update(fetch(path).then((response) => response.blob())));
  page.samples.append(button);
}

async function start() {
  model = await EarlyExitModel.load();
  const { backbone, criterion, labels, samples } = model.config;
  page.about.textContent = `This one is ${backbone} with ${model.numExits} exits and ${labels.length} classes.`;
  page.runtime.textContent = `${RUNTIME}, WebAssembly, one thread. Criterion: ${criterion}.`;
  const range = criterion === "patience" ? model.numExits : 1; // patience counts exits, other scores reach 1
  Object.assign(page.shift, { min: -range, max: range, step: range === 1 ? 0.01 : 1 });
  samples.forEach(addSample);
  showShift();
  listen();
  page.status.hidden = true;
  page.main.hidden = false;
  if (samples.length) page.samples.firstElementChild.click();
}

start().catch(showError);
