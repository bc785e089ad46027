"""Accuracy of every method on CIFAR-10, with the same network, recipe and seeds.

    python benchmarks/accuracy.py --dataset path/to/cifar10 --parallel 2

Each run is `examples/train_cifar.py` as a user would start it. It writes one JSON file to `results/accuracy/`; runs
that are there are not repeated, and table and plot are drawn from all of them. The network is a narrow ResNet
(channels 16, 32, 64 and 128, one block per stage, 3x3 stem), small enough that all runs take hours on a few cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
NETWORK = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}
# The teacher is deeper and as wide, so that its features can be mimicked without a projection.
TEACHER = {"layers": [2, 2, 2, 2], "channels": [16, 32, 64, 128]}

# A configuration's options in addition to the recipe; {teacher} is the folder of the teacher's checkpoint.
CONFIGURATIONS = {
    "none": ["--method", "none"],
    "label_smoothing": ["--method", "none", "--label_smoothing_factor", "0.1"],
    "deep_supervision": ["--method", "deep_supervision"],
    "byot": ["--method", "byot"],
    "eed": ["--method", "eed"],
    "frskd": ["--method", "frskd"],
    "lsh": ["--method", "lsh"],
    # the family's ramp takes 80 of 300 epochs
    "okd_mde": ["--method", "okd_mde", "--method_args", '{"ramp_epochs": RAMP}'],
    "lsh_teacher": ["--method", "lsh", "--method_args", '{"teacher": "TEACHER"}'],
    "kd": ["--method", "kd", "--method_args", '{"teacher": "TEACHER"}'],
}


def recipe(arguments: argparse.Namespace) -> list[str]:
    epochs = arguments.epochs
    options = {
        "dataset": arguments.dataset,
        "max_train_samples": arguments.train_images,
        "num_train_epochs": epochs,
        "lr_milestones": f"{round(0.5 * epochs)} {round(0.75 * epochs)} {round(0.9 * epochs)}",
        "bf16": "true",
        "use_cpu": str(not torch.accelerator.is_available()).lower(),
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": "true",
    }
    return [word for name, value in options.items() for word in (f"--{name}", *str(value).split(" "))]


def train(
    arguments: argparse.Namespace, name: str, seed: int, network: dict, options: list[str], folder: Path
) -> None:
    """Train once and write the run's JSON, if it is not there."""
    result = RESULTS / f"{name}-seed{seed}.json"
    if result.exists() and (name != "teacher" or (folder / "config.json").exists()):
        return
    ramp = str(max(1, round(arguments.epochs * 80 / 300)))
    options = [option.replace("TEACHER", str(folder.parent / "teacher")).replace("RAMP", ramp) for option in options]
    options += ["--backbone_kwargs", json.dumps(network), "--seed", str(seed)]
    command = [sys.executable, str(ROOT / "examples" / "train_cifar.py"), *recipe(arguments), *options]
    start = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    process = subprocess.run(
        [*command, "--output_dir", str(folder)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    if process.returncode:
        raise RuntimeError(f"{name} with seed {seed} failed:\n{process.stderr[-2000:]}")
    metrics = json.loads((folder / "eval_results.json").read_text())
    facts = {
        "configuration": name,
        "seed": seed,
        "options": [option for option in options if str(folder.parent) not in option],
        "train_images": arguments.train_images,
        "epochs": arguments.epochs,
        "accuracy": {
            key.removeprefix("eval_accuracy_"): value for key, value in metrics.items() if "accuracy_" in key
        },
        "loss": metrics["eval_loss"],
        "minutes": round((time.time() - start) / 60, 1),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    result.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{name} seed {seed}: {facts['accuracy']} in {facts['minutes']} minutes", flush=True)


def summarise() -> None:
    """Draw the table and the plot of all finished runs."""
    runs: dict[str, list[dict]] = {name: [] for name in CONFIGURATIONS}
    for path in sorted(RESULTS.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        if run["configuration"] in runs:
            runs[run["configuration"]].append(run)
    runs = {name: found for name, found in runs.items() if found}
    columns = sorted(next(iter(runs.values()))[0]["accuracy"], key=lambda column: column == "ensemble")  # exits first
    lines = [
        "| configuration | seeds | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, found in runs.items():
        values = [[100 * run["accuracy"][column] for run in found] for column in columns]
        errors = [stdev(column) / len(column) ** 0.5 if len(column) > 1 else None for column in values]
        cells = [
            f"{mean(column):.2f}" + ("" if error is None else f" ± {error:.2f}")
            for column, error in zip(values, errors, strict=True)
        ]
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
        axes.errorbar(
            columns, [mean(column) for column in values], [error or 0 for error in errors], label=name, capsize=2
        )
    first = next(iter(runs.values()))[0]
    lines += [
        "",
        f"CIFAR-10 test accuracy in percent, mean and standard error over seeds; {first['train_images']:,} training "
        f"images, {first['epochs']} epochs.",
    ]
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "accuracy.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", help="a local folder of CIFAR-10, or cifar10 for the Hub; without it only the summary"
    )
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train_images", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if arguments.dataset:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.parallel) as pool:
            work = Path(folder)
            if any("TEACHER" in str(CONFIGURATIONS[name]) for name in arguments.configurations):
                train(arguments, "teacher", 0, TEACHER, ["--method", "none", "--exits", "[]"], work / "teacher")
            futures = [
                pool.submit(train, arguments, name, seed, NETWORK, CONFIGURATIONS[name], work / f"{name}-{seed}")
                for seed in arguments.seeds
                for name in arguments.configurations
            ]
            for future in futures:
                future.result()
    summarise()


if __name__ == "__main__":
    main()
