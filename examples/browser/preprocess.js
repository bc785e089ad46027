// Photographs to network inputs, as timm does for evaluation. A canvas does not resize as Pillow does, so its resizing,
// rounding to 8 bits included, is here. The pixels are the same, but for images more than about twice as tall as wide:
// Pillow 13 resizes those vertically first, and some pixels differ by a few levels of 255.

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: cubic },
  lanczos: { support: 3, weight: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
};
const PRECISION = 2 ** 22; // Pillow's coefficients are fixed-point numbers

function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function roundHalfToEven(x) {
  const rounded = Math.round(x);
  return rounded - x === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

/** Return, for each new pixel of a row, the first old pixel and the weights of those from there. */
function coefficients(oldSize, newSize, { support, weight }) {
  const scale = oldSize / newSize;
  const stretch = Math.max(1, scale); // a filter as wide as what becomes one pixel
  return Array.from({ length: newSize }, (_, index) => {
    const center = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const end = Math.min(oldSize, Math.trunc(center + support * stretch + 0.5));
    const weights = [];
    for (let x = first; x < end; x++) weights.push(weight((x - center + 0.5) * (1 / stretch)));
    const sum = weights.reduce((total, value) => total + value, 0);
    return { first, weights: weights.map((value) => roundAwayFromZero((value / sum) * PRECISION)) };
  });
}

function roundAwayFromZero(x) {
  return Math.trunc(x < 0 ? x - 0.5 : x + 0.5);
}

/**
 * Resize along one axis.
 * @param {Uint8ClampedArray} data - Pixels, seen as (outer, size, inner).
 * @param {number} inner - Numbers between two neighbours on the axis.
 */
function resizeAxis(data, size, newSize, inner, filter) {
  if (size === newSize) return data;
  const outer = data.length / size / inner;
  const result = new Uint8ClampedArray(outer * newSize * inner);
  coefficients(size, newSize, filter).forEach(({ first, weights }, index) => {
    for (let row = 0; row < outer; row++) {
      for (let column = 0; column < inner; column++) {
        let sum = PRECISION / 2;
        let place = (row * size + first) * inner + column;
        for (const weight of weights) {
          sum += data[place] * weight;
          place += inner;
        }
        result[(row * newSize + index) * inner + column] = Math.floor(sum / PRECISION);
      }
    }
  });
  return result;
}

/** Return the width and height that an image is resized to before it is cropped. */
function resizedSize(width, height, config) {
  const [, cropHeight, cropWidth] = config.input_size;
  const newWidth = Math.floor(cropWidth / config.crop_pct);
  const newHeight = Math.floor(cropHeight / config.crop_pct);
  if (config.crop_mode === "squash") return [newWidth, newHeight];
  if (newWidth !== newHeight) {
    const scale = Math.max(newWidth / width, newHeight / height);
    return [roundHalfToEven(width * scale), roundHalfToEven(height * scale)];
  }
  if (width <= height) return [newWidth, Math.trunc((newWidth * height) / width)];
  return [Math.trunc((newHeight * width) / height), newHeight];
}

/** Drop the alpha of RGBA pixels, or make them grey as Pillow does. */
function channelsOf(rgba, channels) {
  const result = new Uint8ClampedArray((rgba.length / 4) * channels);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    const [red, green, blue] = [rgba[from], rgba[from + 1], rgba[from + 2]];
    if (channels === 1) {
      result[to++] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    } else {
      result[to++] = red;
      result[to++] = green;
      result[to++] = blue;
    }
  }
  return result;
}

/**
 * Turn an image into the input of the network.
 * @param {ImageData} image - RGBA pixels.
 * @param {object} config - input_size, crop_pct, crop_mode, interpolation, mean and std, as in model.json.
 * @returns {Float32Array} (channels, height, width)
 */
export function preprocess({ data, width, height }, config) {
  const [channels, cropHeight, cropWidth] = config.input_size;
  const [newWidth, newHeight] = resizedSize(width, height, config);
  const filter = FILTERS[config.interpolation];
  let pixels = channelsOf(data, channels);
  pixels = resizeAxis(pixels, width, newWidth, channels, filter);
  pixels = resizeAxis(pixels, height, newHeight, newWidth * channels, filter);
  const left = roundHalfToEven((newWidth - cropWidth) / 2);
  const top = roundHalfToEven((newHeight - cropHeight) / 2);
  const result = new Float32Array(channels * cropHeight * cropWidth);
  let to = 0;
  for (let channel = 0; channel < channels; channel++) {
    for (let y = top; y < top + cropHeight; y++) {
      for (let x = left; x < left + cropWidth; x++) {
        const pixel = pixels[(y * newWidth + x) * channels + channel];
        result[to++] = (pixel / 255 - config.mean[channel]) / config.std[channel];
      }
    }
  }
  return result;
}

/** Decode a file and return its pixels, upright and without colour management, as Pillow reads them. */
export async function readPixels(blob) {
  const bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}
