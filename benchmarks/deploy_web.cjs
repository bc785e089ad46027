// Run images through a file in onnxruntime-web: node deploy_web.cjs FOLDER_WITH_NODE_MODULES FOLDER_OF_THE_REQUEST
const fs = require("fs");
const path = require("path");

const [modules, place] = process.argv.slice(2);
const ort = require(require.resolve("onnxruntime-web", { paths: [modules] }));

async function main() {
  ort.env.wasm.numThreads = 1;
  const request = JSON.parse(fs.readFileSync(path.join(place, "request.json")));
  const bytes = fs.readFileSync(path.join(place, "images"));
  const images = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  const session = await ort.InferenceSession.create(fs.readFileSync(request.file), { executionProviders: ["wasm"] });
  const [count, ...shape] = request.shape;
  const perImage = shape.reduce((product, side) => product * side, 1);
  const answer = { logits: [], exit_index: [], confidence: [] };
  const thresholds = new ort.Tensor("float32", request.thresholds, [request.thresholds.length]);
  for (let start = 0; start < count; start += request.batch) {
    const rows = Math.min(request.batch, count - start);
    const part = images.slice(start * perImage, (start + rows) * perImage);
    const pixel_values = new ort.Tensor("float32", part, [rows, ...shape]);
    const output = await session.run({ pixel_values, thresholds });
    for (const name of Object.keys(answer)) answer[name].push(...Array.from(output[name].data, Number));
  }
  console.log(JSON.stringify(answer));
}

main();
