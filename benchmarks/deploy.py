"""Early exit outside Python: exits against this library's, time, size and memory, and INT8.

    python benchmarks/deploy.py --parts time size --rounds 9
    python benchmarks/deploy.py --parts equal int8 --checkpoint runs/eed --dataset cifar10

Each part replaces its own entry in the JSON file of results, those of `--models` where models are timed, from which
the Markdown table is written again. Weights of the timing parts are random. OpenVINO takes part if it is installed;
onnxruntime-web with `--web FOLDER`, a folder in which `npm install onnxruntime-web` was run.
"""

import argparse
import importlib.util
import json
import logging
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from deploy_report import report
from deploy_times import MODELS, open_session, sizes, times, write_files
from torch import Tensor

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, export_early_exit
from hf_selfkd.evaluation.curves import collect_logits
from hf_selfkd.models.exit_policy import CRITERIA

SETTINGS = 10
BATCH = 100
# Scores this near to a threshold may fall on its other side in another runtime.
NEAR = 1e-5

# Maps images and thresholds to logits, exits and confidences.
Run = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]


# Runtimes


def in_onnxruntime(path: Path) -> Run:
    session = open_session(path)
    return lambda images, thresholds: session.run(None, {"pixel_values": images, "thresholds": thresholds})


def in_openvino(path: Path) -> Run:
    import openvino

    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return lambda images, thresholds: [*compiled({"pixel_values": images, "thresholds": thresholds}).values()]


def in_web(path: Path, folder: Path) -> Run:
    def run(images: np.ndarray, thresholds: np.ndarray) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "images").write_bytes(images.tobytes())
            request = {"file": str(path), "shape": images.shape, "thresholds": thresholds.tolist(), "batch": BATCH}
            (Path(place) / "request.json").write_text(json.dumps(request))
            script = Path(__file__).with_name("deploy_web.cjs")
            output = subprocess.check_output(["node", script, folder, place], text=True)
        answer = json.loads(output.splitlines()[-1])
        classes = len(answer["logits"]) // len(images)
        logits = np.array(answer["logits"], dtype=np.float32).reshape(-1, classes)
        return [logits, np.array(answer["exit_index"]), np.array(answer["confidence"], dtype=np.float32)]

    return run


# Parts


def load(options: argparse.Namespace) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Return a trained checkpoint, the images and labels of the unseen evaluation split, and the logits."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from data import DataArguments, LabelledImages, load_images

    model = MultiExitForImageClassification.from_pretrained(options.checkpoint).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.config.pretrained_cfg))
    images, _ = load_images(DataArguments(dataset=options.dataset, max_eval_samples=options.num_images))
    data = LabelledImages(images["test"], transform)
    pixel_values = torch.stack([data[index]["pixel_values"] for index in range(len(data))])
    logits, labels = collect_logits(model, torch.utils.data.DataLoader(data, batch_size=BATCH))
    return model, pixel_values, labels, logits


def policies(criterion: str, logits: Tensor) -> list[ExitPolicy]:
    """Return policies by which ever more images exit early."""
    history, scores = None, []
    base = ExitPolicy(criterion=criterion, thresholds=[0.0] * (len(logits) - 1))
    for exit in range(len(logits) - 1):
        found, _, history = base.score(exit, logits[exit], history)
        scores.append(found)
    shares = torch.linspace(0, 1, SETTINGS + 2)[1:-1]
    return [
        replace(base, thresholds=[torch.quantile(found, 1 - share).item() for found in scores]) for share in shares
    ]


def near(policy: ExitPolicy, logits: Tensor) -> Tensor:
    """Return which images have a score at most ``NEAR`` from a threshold; of counts, none has."""
    history, found = None, torch.zeros(logits.shape[1], dtype=torch.bool)
    for exit, threshold in enumerate(policy.thresholds):
        scores, _, history = policy.score(exit, logits[exit], history)
        if not CRITERIA[policy.criterion].uses_history:
            found |= (scores - threshold).abs() <= NEAR
    return found


@torch.no_grad()
def compare(model, run: Run, images: Tensor, logits: Tensor, settings: Sequence[ExitPolicy]) -> dict[str, Any]:
    """Run images with every setting in a runtime and in Python, and count the exits that differ."""
    row: dict[str, Any] = {"images": len(images), "settings": len(settings), "differ": 0, "differ near": 0, "near": 0}
    row["largest difference of logits"] = 0.0
    shares = torch.zeros(model.num_exits)
    for policy in settings:
        is_near = near(policy, logits[:, : len(images)])
        row["near"] += int(is_near.sum())
        thresholds = np.array(policy.thresholds, dtype=np.float32)
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            expected = model.early_exit(batch, policy)
            found, exits, _ = map(torch.from_numpy, run(batch.numpy(), thresholds))
            differs = exits != expected.exit_index
            beside = is_near[start : start + BATCH]
            row["differ"] += int((differs & ~beside).sum())
            row["differ near"] += int((differs & beside).sum())
            error = (found - expected.logits).abs().amax(dim=1)[~differs].max() / expected.logits.abs().max()
            row["largest difference of logits"] = max(row["largest difference of logits"], error.item())
            shares += torch.bincount(expected.exit_index, minlength=model.num_exits)
    row["share of each exit"] = (shares / shares.sum()).tolist()
    return row


def equal(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare exits of real images in every runtime with those of ``early_exit``."""
    model, images, _, logits = load(options)
    rows = []
    for criterion in (name for name, record in CRITERIA.items() if not record.multi_label):
        settings = policies(criterion, logits)
        path = export_early_exit(model, options.work_dir / f"{criterion}.onnx", settings[0])
        all_images = criterion == "confidence"
        few = options.few_images
        runtimes = {"onnxruntime": (in_onnxruntime(path), len(images) if all_images else few)}
        if all_images and importlib.util.find_spec("openvino"):
            runtimes["OpenVINO"] = in_openvino(path), few
        if all_images and options.web:
            runtimes["onnxruntime-web"] = in_web(path, options.web.resolve()), few
        for runtime, (run, count) in runtimes.items():
            row = {"runtime": runtime, "criterion": criterion}
            rows.append(row | compare(model, run, images[:count], logits, settings))
            print(rows[-1], flush=True)
    return rows


def int8(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantise the file with onnxruntime's dynamic quantisation, and compare the accuracy of every exit."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, images, labels, logits = load(options)
    path = export_early_exit(model, options.work_dir / "float.onnx", policies("confidence", logits)[0])
    quantized = options.work_dir / "int8.onnx"
    quantize_dynamic(path, quantized, weight_type=QuantType.QUInt8, extra_options={"EnableSubgraph": True})
    rows = []
    for file in (path, quantized):
        run, row = in_onnxruntime(file), {"file": file.stem, "bytes": file.stat().st_size}
        for exit in range(model.num_exits):
            thresholds = np.array([2.0] * exit + [0.0] * (model.num_exits - 1 - exit), dtype=np.float32)
            parts = [run(images[start : start + BATCH].numpy(), thresholds) for start in range(0, len(images), BATCH)]
            predictions = np.concatenate([logits.argmax(axis=1) for logits, _, _ in parts])
            assert all((exits == exit).all() for _, exits, _ in parts)
            row[f"exit {exit}"] = float((predictions == labels.numpy()).mean())
        rows.append(row | {"backbone": model.config.backbone})
        print(rows[-1], flush=True)
    return rows


def time(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in options.models:
        write_files(name, options.work_dir / name)
        for batch_size in (1, 16):
            rounds = options.rounds if batch_size == 1 else max(3, options.rounds // 2)
            rows.append(times(name, options.work_dir / name, batch_size, rounds))
            print(rows[-1], flush=True)
    return rows


def size(options: argparse.Namespace) -> list[dict[str, Any]]:
    for name in options.models:
        write_files(name, options.work_dir / name)
    return [sizes(name, options.work_dir / name) for name in options.models]


PARTS = {"equal": equal, "time": time, "size": size, "int8": int8}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/deploy"), help="For the ONNX files.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="For the parts time and size.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--checkpoint", help="A trained checkpoint, for the parts equal and int8.")
    parser.add_argument("--dataset", default="cifar10", help="As for examples/train_cifar.py.")
    parser.add_argument("--num_images", type=int, help="Default: the complete evaluation split.")
    parser.add_argument("--few_images", type=int, default=1000, help="For other runtimes and criteria.")
    parser.add_argument("--web", type=Path, help="Folder whose node_modules has onnxruntime-web.")
    options = parser.parse_args(arguments)
    if not options.checkpoint and {"equal", "int8"}.intersection(options.parts):
        parser.error("The parts equal and int8 need --checkpoint.")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    path = options.output / "deploy.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in options.parts:
        rows = PARTS[part](options)
        measured = {row.get("model") for row in rows}
        results[part] = [row for row in results.get(part, []) if row.get("model") not in measured] + rows
        results["versions"] = {
            "python": platform.python_version(),
            "torch": torch.__version__.partition("+")[0],
            "timm": timm.__version__,
            "onnxruntime": onnxruntime.__version__,
        }
        path.write_text(json.dumps(results, indent=1) + "\n")
        (options.output / "deploy.md").write_text(report(results))


if __name__ == "__main__":
    main()
