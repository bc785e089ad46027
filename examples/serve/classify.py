"""Classify image files or folders with a model from `export_early_exit`; needs onnxruntime, numpy and Pillow only.

python examples/serve/classify.py exits.onnx photo.jpg photographs/ --batch_size 16 --threads 1
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from early_exit_model import EarlyExitModel
from PIL import Image

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return all image files in the given files and folders, in order."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise SystemExit(f"{path} does not exist.")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [file for file in inside if not path.is_dir() or file.suffix.lower() in EXTENSIONS]
    if not found:
        raise SystemExit(f"No images in {', '.join(map(str, paths))}.")
    return found


def read(model: EarlyExitModel, files: Sequence[Path]) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield every image that can be read, and report the others."""
    for file in files:
        try:
            with Image.open(file) as image:
                yield file, model.preprocess(image)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(f"{file}: left out, {error}")


def batches(samples: Iterator, size: int) -> Iterator[list]:
    """Group samples; the last batch may be smaller."""
    batch = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument("images", nargs="+", type=Path, help="image files and folders")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--thresholds", type=float, nargs="+", help="instead of those of the file, one per early exit")
    parser.add_argument("--threshold_shift", type=float, help="added to the thresholds; below 0 exits earlier")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        model = EarlyExitModel(options.model, options.threads)
        thresholds = model.check_thresholds(options.thresholds or model.thresholds)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    thresholds = np.maximum(0, thresholds + (options.threshold_shift or 0))
    exits, seconds = Counter(), 0.0
    for batch in batches(read(model, find_images(options.images)), options.batch_size):
        files, images = zip(*batch, strict=True)
        start = time.perf_counter()
        classes, confidences, taken = model.predict(np.stack(images), thresholds)
        seconds += time.perf_counter() - start
        exits.update(taken.tolist())
        for file, index, confidence, exit in zip(files, classes, confidences, taken, strict=True):
            print(f"{file}: {model.labels[index]} {100 * confidence:.1f} % at exit {exit}")
    total = exits.total()
    if not total:
        raise SystemExit("None of the files is a readable image.")
    shares = ", ".join(f"exit {exit} {100 * exits[exit] / total:.1f} %" for exit in range(model.num_exits))
    print(f"{total} images, {total / seconds:.1f} images per second without reading the files: {shares}")


if __name__ == "__main__":
    main()
