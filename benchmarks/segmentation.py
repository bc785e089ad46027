"""Measure semantic segmentation on CamVid: no distillation, deep supervision and FRSKD, same network, same seeds.

    python benchmarks/segmentation.py --dataset path/to/camvid --work_dir runs/segmentation

CamVid at half size (240x180, 367 images to train on, 233 to test on, 11 classes, ignored pixels are 11) must be in the
folder, as parquet files with the columns `image` and `label`. A small ResNet is trained from scratch with
`examples/train_segmentation.py`; the recipe is below. Every run writes one JSON file to
`benchmarks/results/segmentation` and is not repeated while that is there; then a table is written, and a picture of
labels and predictions, without the photographs, because the data may not be redistributed. Each run's `pictures/` has
them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "segmentation"
EPOCHS = 12
CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
RECIPE = {
    "evaluation_split": "test",
    "class_names": json.dumps(CLASSES),
    "ignore_index": 11,
    "backbone": "resnet18",
    "backbone_kwargs": json.dumps({"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}),
    "pyramid_width": 32,
    "image_size": "180 240",
    # Nearly the full image: with crops of 96x128 the two coarsest levels see a few pixels only and mislead the head on
    # full images, which the auxiliary exits then beat.
    "crop_size": "160 224",
    "scale_range": "0.75 1.5",
    "num_train_epochs": EPOCHS,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.05,
    "lr_milestones": EPOCHS * 2 // 3,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": "true",
}
# The ramp of the soft labels and attention terms takes the last third of the run, as it does in the paper.
METHODS = {
    "none": {},
    "deep_supervision": {},
    "frskd": {"ramp_start": EPOCHS * 2 // 3, "ramp_end": EPOCHS},
}


def run(method: str, seed: int, dataset: Path, work_dir: Path) -> None:
    result = RESULTS / f"{method}-seed{seed}.json"
    if result.is_file():
        return
    output_dir = work_dir / f"{method}-seed{seed}"
    options = RECIPE | {"dataset": dataset, "output_dir": output_dir, "seed": seed, "method": method}
    options["method_args"] = json.dumps(METHODS[method])
    command = [sys.executable, str(ROOT.parent / "examples" / "train_segmentation.py")]
    for name, value in options.items():
        is_list = name in ("image_size", "crop_size", "scale_range")
        command += [f"--{name}", *(str(value).split() if is_list else [str(value)])]
    with open(work_dir / f"{method}-seed{seed}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    metrics = json.loads((output_dir / "eval_results.json").read_text())
    kept = {name: value for name, value in metrics.items() if name.startswith(("eval_mean_iou", "eval_pixel"))}
    described = {"method": method, "method_args": METHODS[method], "seed": seed, "torch": torch.__version__}
    result.write_text(json.dumps(described | {"recipe": RECIPE} | kept, indent=2) + "\n")


def table() -> str:
    """Return mean and, from two seeds on, standard error of every method, in percent."""
    rows = ["| method | seeds | mean IoU | pixel accuracy | mean IoU of the ensemble |", "|" + " --- |" * 5]
    for method in METHODS:
        results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{method}-seed*.json"))]
        if results:
            names = ("eval_mean_iou", "eval_pixel_accuracy", "eval_ensemble_mean_iou")
            cells = [with_error([100 * result[name] for result in results]) for name in names]
            rows.append(f"| {method} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def with_error(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def picture(work_dir: Path, seed: int) -> None:
    """Put labels and predictions of the methods side by side, one image per row."""
    rows = []
    folders = [work_dir / f"{method}-seed{seed}" / "pictures" for method in METHODS]
    if not all(folder.is_dir() for folder in folders):
        return
    for path in sorted(folders[0].glob("*.png")):
        panels = [np.array(Image.open(folder / path.name)) for folder in folders]
        width = panels[0].shape[1] // 3
        rows.append(np.concatenate([panels[0][:, width : 2 * width], *(panel[:, 2 * width :] for panel in panels)], 1))
    Image.fromarray(np.concatenate(rows)).save(RESULTS / "label-none-deep_supervision-frskd.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [(method, seed) for seed in args.seeds for method in METHODS]
        for job in [pool.submit(run, *each, args.dataset, args.work_dir) for each in runs]:
            job.result()
    (RESULTS / "table.md").write_text(table())
    picture(args.work_dir, args.seeds[0])
    print(table())


if __name__ == "__main__":
    main()
