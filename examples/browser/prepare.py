"""Put the page, a model from `export_early_exit` and onnxruntime-web into one folder, for any static host.

    npm install --omit=dev --prefix examples/browser
    python examples/browser/prepare.py exits.onnx page --samples photo.jpg
    python -m http.server --directory page

onnxruntime-web does not read the metadata of an ONNX file: it goes to `model.json`. Needs onnx only.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx

HERE = Path(__file__).parent
PAGE = ("README.md", "index.html", "style.css", "app.js", "early_exit.js", "preprocess.js")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
# What preprocess.js can do.
SUPPORTED = {"interpolation": ("bilinear", "bicubic", "lanczos"), "crop_mode": ("center", "squash")}


def read_metadata(model: onnx.ModelProto) -> dict:
    """Return the metadata of a model.

    Raises:
        ValueError: If it was not written by `export_early_exit`, or its preprocessing is not that of the page.
    """
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    if "thresholds" not in metadata:
        raise ValueError("The model was not written by export_early_exit: its metadata has no thresholds.")
    for name, values in SUPPORTED.items():
        if metadata[name] not in values:
            raise ValueError(f"The page needs {name} {' or '.join(values)}, but the model has {metadata[name]!r}.")
    return metadata


def require_thresholds(model: onnx.ModelProto) -> None:
    """Remove the default of the thresholds: onnxruntime-web takes no values for inputs that have one."""
    [default] = [tensor for tensor in model.graph.initializer if tensor.name == "thresholds"]
    model.graph.initializer.remove(default)


def prepare(model: Path, folder: Path, samples: Sequence[Path] = ()) -> None:
    """Write the page.

    Args:
        model: The ONNX file.
        folder: Where the page goes; files of an earlier page are replaced.
        samples: Photographs that the page offers.

    Raises:
        ValueError: If the page cannot show the model.
        FileNotFoundError: If a file or onnxruntime-web is missing.
    """
    if Path(f"{model}.data").exists():
        raise ValueError(f"{model} has its weights in a second file: it is too large for a browser.")
    file = onnx.load(model)
    metadata = read_metadata(file)
    require_thresholds(file)
    runtime = HERE / "node_modules" / "onnxruntime-web" / "dist"
    if not runtime.exists():
        raise FileNotFoundError(f"onnxruntime-web is missing. Run npm install --omit=dev --prefix {HERE}.")
    for name in ("samples", "onnxruntime-web"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        shutil.copy(HERE / name, folder)
    for name in RUNTIME:
        shutil.copy(runtime / name, folder / "onnxruntime-web")
    onnx.save(file, folder / "model.onnx")
    for sample in samples:
        shutil.copy(sample, folder / "samples")
    metadata["samples"] = [f"samples/{sample.name}" for sample in samples]
    (folder / "model.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument("folder", type=Path, help="where the page goes")
    parser.add_argument("--samples", type=Path, nargs="+", default=[], help="photographs that the page offers")
    options = parser.parse_args(argv)
    try:
        prepare(options.model, options.folder, options.samples)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
