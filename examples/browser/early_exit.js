// A model from export_early_exit, run with onnxruntime-web.

import * as ort from "./onnxruntime-web/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers that few static hosts send
ort.env.wasm.proxy = true; // in a worker, so that the page stays responsive

const NEVER = Infinity; // no score reaches it
const ALWAYS = 0; // every score does

export const RUNTIME = `onnxruntime-web ${ort.env.versions.web}`;

export class EarlyExitModel {
  /** Load the model that prepare.py put beside this file. */
  static async load() {
    const config = await (await fetchFile("model.json")).json();
    const file = new Uint8Array(await (await fetchFile("model.onnx")).arrayBuffer());
    const session = await ort.InferenceSession.create(file, { logSeverityLevel: 3 });
    return new EarlyExitModel(session, config);
  }

  constructor(session, config) {
    this.session = session;
    this.config = config;
    this.numExits = config.thresholds.length + 1;
  }

  /** Return thresholds with which every image stops at an exit. */
  stoppingAt(exit) {
    return this.config.thresholds.map((_, index) => (index < exit ? NEVER : ALWAYS));
  }

  /** Return the thresholds of the file plus a shift; below 0 images exit earlier. */
  shifted(shift) {
    return this.config.thresholds.map((threshold) => Math.max(0, threshold + shift));
  }

  /**
   * Classify one image.
   * @param {Float32Array} pixelValues - (channels, height, width)
   * @param {number[]} thresholds - One per auxiliary exit.
   */
  async run(pixelValues, thresholds) {
    const inputs = {
      pixel_values: new ort.Tensor("float32", pixelValues.slice(), [1, ...this.config.input_size]),
      thresholds: new ort.Tensor("float32", thresholds, [thresholds.length]),
    };
    const start = performance.now();
    const { logits, exit_index, confidence } = await this.session.run(inputs);
    const milliseconds = performance.now() - start;
    const classIndex = logits.data.indexOf(Math.max(...logits.data));
    return {
      exit: Number(exit_index.data[0]),
      label: this.config.labels[classIndex],
      confidence: confidence.data[0],
      milliseconds,
    };
  }
}

async function fetchFile(name) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name} is not beside the page (status ${response.status}). Run prepare.py.`);
  return response;
}
