// Drives the page in headless Chromium, for test_browser.py.
// node browser.mjs CHROMIUM URL < {"files": [paths], "bad": path}

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename } from "node:path";

const require = createRequire(new URL("../../examples/browser/package.json", import.meta.url));
const { chromium } = require("playwright-core");
const [executablePath, url] = process.argv.slice(2);
const { files, bad } = JSON.parse(readFileSync(0, "utf-8"));

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] }); // containers run as root
const page = await browser.newPage();
const problems = [];
page.on("pageerror", (error) => problems.push(error.message));
page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
await page.goto(url);
await page.locator("#main:not([hidden])").waitFor();

async function rows() {
  await page.locator("#main[aria-busy=false]").waitFor();
  return page.locator("#exits li").evaluateAll((items) =>
    items.map((item) => ({
      state: item.className,
      label: item.querySelector(".label").textContent,
      confidence: parseFloat(item.querySelector(".confidence").textContent) / 100,
    })),
  );
}

async function shift(value) {
  await page.locator("#shift").fill(String(value));
  return rows();
}

const found = [];
for (const file of files) {
  await page.setInputFiles("#file", file);
  const shown = await rows();
  const pixels = await page.evaluate(async () => {
    const { preprocess, readPixels } = await import("./preprocess.js");
    const config = await (await fetch("model.json")).json();
    return [...preprocess(await readPixels(document.querySelector("#file").files[0]), config)];
  });
  const times = (await page.locator("#times b").allTextContents()).map(parseFloat);
  found.push({ file: basename(file), rows: shown, pixels, times });
}
await page.evaluate(async () => {
  const sample = document.querySelector("#samples img").src;
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([await (await fetch(sample)).blob()], "sample"));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
});
const dropped = await rows();
await page.setInputFiles("#file", files[1]);
await rows();
await page.locator("#samples button").click();
const clicked = await rows();
const [lowest, highest] = [await shift(-1), await shift(1)];
await page.setInputFiles("#file", bad);
await rows();
const error = await page.locator("#status.error").textContent();
await browser.close();
console.log(JSON.stringify({ found, dropped, clicked, lowest, highest, error, problems }));
