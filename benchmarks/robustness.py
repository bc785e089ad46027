"""Inject the faults of long runs, and record which runs recover and what is lost.

    python benchmarks/robustness.py --output benchmarks/results                 # everything
    python benchmarks/robustness.py --parts kill leaks --output benchmarks/results

Every fault is injected into the example as a user runs it, in separate processes, on the CPU. Results of parts that
are not run again stay in the file.
"""

import argparse
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch
from robustness_runs import (
    NUM_STEPS,
    PROCESSES,
    SCAFFOLDED,
    Gauge,
    Run,
    count,
    differences,
    finish,
    launcher,
    leftovers,
    outcome,
    teacher,
)
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, SelfDistillationTrainer
from hf_selfkd.evaluation.curves import to_table

NUM_LEAK_STEPS = 2000


def record(fault: str, trials: list[list[str]], survival: str) -> dict:
    """Sum up trials, each a list of what was lost."""
    lost = sorted({what for trial in trials for what in trial})
    survived = sum(not trial for trial in trials)
    print(f"{fault}: {survived} of {len(trials)} survived; lost: {', '.join(lost) or 'nothing'}", flush=True)
    return {"fault": fault, "tried": len(trials), "survived": survived, "survival": survival, "lost": lost}


def missing(**kept) -> list[str]:
    """List the names whose value is false."""
    return [name for name, is_kept in kept.items() if not is_kept]


def finish_uninterrupted(folder: Path, processes: int, options: dict = SCAFFOLDED) -> tuple[dict, Path]:
    """Run to the end without a fault; return the options of the run, and its folder."""
    options = {**options, "processes": processes, "per_device_train_batch_size": 16 // processes}
    uninterrupted = folder / f"uninterrupted-{processes}"
    finish(uninterrupted, **options)
    return options, uninterrupted


# kill -9


def kill(folder: Path, trials: int) -> list[dict]:
    """Kill runs at random moments and while they write a checkpoint, and run the same command again."""
    records = []
    for processes in PROCESSES:
        options = SCAFFOLDED if processes == 1 else {"method": "lsh", "method_args": json.dumps(teacher(folder))}
        start = time.time()
        options, uninterrupted = finish_uninterrupted(folder, processes, options)
        reference, duration = outcome(uninterrupted), time.time() - start
        moments = {"at a random moment": [], "while a checkpoint is written": []}
        generator = random.Random(processes)
        for trial in range(trials):
            for moment, results in moments.items():
                place = folder / f"killed-{processes}-{len(results)}-{moment.split()[1]}"
                workers = {"dataloader_num_workers": trial % 3}
                run = Run(place, **options, **workers)
                if moment == "at a random moment":
                    run.wait_for("checkpoint-3")
                    time.sleep(generator.uniform(0, 0.4) * duration)
                else:
                    step = 3 * generator.randint(1, NUM_STEPS // 3)
                    run.wait_for(f"_incomplete/checkpoint-{step}/*")
                    time.sleep(generator.uniform(0, 0.05))
                run.kill(signal.SIGKILL)
                run.wait()
                finish(place, **options, **workers)
                results.append(differences(place, reference) + leftovers(place))
        for moment, results in moments.items():
            survival = "the same command ends with the bits of a run that was never stopped"
            records.append(record(f"`kill -9` {moment}, {count(processes)}", results, survival))
    return records


# SIGTERM


def sigterm(folder: Path, trials: int) -> list[dict]:
    """Send SIGTERM to all processes of a run, as schedulers do, and run the same command again."""
    records = []
    for processes in PROCESSES:
        options, uninterrupted = finish_uninterrupted(folder, processes)
        reference, results = outcome(uninterrupted), []
        for trial in range(trials):
            place = folder / f"terminated-{processes}-{trial}"
            run = Run(place, **options, dataloader_num_workers=trial % 2)
            run.wait_for(f"checkpoint-{3 * (trial + 1)}")
            run.kill(signal.SIGTERM)
            stopped = run.wait() != 0
            saved = re.findall(r"Ending after step (\d+) because of SIGTERM", run.printed)
            lost = missing(status=stopped, checkpoint=saved and (place / f"checkpoint-{saved[-1]}").is_dir())
            finish(place, **options, dataloader_num_workers=trial % 2)
            results.append(lost + differences(place, reference) + leftovers(place))
        survival = "a checkpoint of the step it was in, then as above"
        records.append(record(f"SIGTERM to all processes, {count(processes)}", results, survival))
    return records


# A full disk

# For files written by torch, its writer hides the error of the system.
FULL = r"checkpoint-\d+ could not be written to .*(File too large|iostream error).* there must be room for one more"


def disk(folder: Path, trials: int) -> list[dict]:
    """Resume from a checkpoint with a limit on the size of files, then without it."""
    records = []
    for processes in PROCESSES:
        options, uninterrupted = finish_uninterrupted(folder, processes)
        reference, results = outcome(uninterrupted), []
        for name in ("model.safetensors", "optimizer.pt"):
            place = folder / f"full-{processes}-{name}"
            run = Run(place, **options)
            run.wait_for("checkpoint-6")
            run.kill(signal.SIGKILL)
            before = contents(place)
            limit = (uninterrupted / f"checkpoint-{NUM_STEPS}" / name).stat().st_size - 1
            run = Run(place, **options, before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
            stopped = run.wait() != 0
            words = re.search(FULL, run.printed)
            lost = missing(status=stopped, error=words, checkpoint=before == contents(place))
            finish(place, **options)
            results.append(lost + differences(place, reference) + leftovers(place))
        survival = "an error that says so, earlier checkpoints byte for byte, then as above"
        records.append(record(f"disk full (`RLIMIT_FSIZE`) while saving, {count(processes)}", results, survival))
    return records


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the files of all checkpoints."""
    return {path: path.read_bytes() for path in folder.glob("checkpoint-*/*")}


# Numbers

POISONED = """
import sys, torch
from transformers import TrainingArguments
from hf_selfkd import MultiExitForImageClassification, SelfDistillationTrainer

torch.manual_seed(0)
images = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 5} for index in range(32)]
images[7]["pixel_values"][0, 0, 0] = float("nan")
args = TrainingArguments(sys.argv[1], per_device_train_batch_size=4, num_train_epochs=2, save_strategy="steps",
                         save_steps=1, use_cpu=True, disable_tqdm=True, learning_rate=0.01, max_grad_norm=0)
model = MultiExitForImageClassification.from_backbone("test_resnet", num_labels=5)
trainer = SelfDistillationTrainer(model, args, train_dataset=images, max_skipped_batches=int(sys.argv[2]))
trainer.train()
finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
print(f"finite: {finite} skipped: {trainer.nonfinite.skipped}\\n", end="")  # in one piece: processes share the output
"""


def numbers(folder: Path, trials: int) -> list[dict]:
    """Make the loss of one process NaN: all processes stop, or skip the batch where that is allowed."""
    records = []
    for processes in PROCESSES:
        for allowed, fault in ((0, "stopped"), (2, "skipped with `max_skipped_batches`")):
            place = folder / f"nan-{processes}-{allowed}"
            script = folder / "poisoned.py"
            script.write_text(POISONED)
            command = [sys.executable, *launcher(processes), str(script), str(place), str(allowed)]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if allowed:
                lost = missing(weights=ended.stdout.count("finite: True skipped: 2") == processes)
            else:
                words = r"FloatingPointError: .*loss/label is nan.* for the samples .*\b7\b"
                lost = missing(status=ended.returncode != 0, error=len(re.findall(words, ended.stderr)) >= processes)
            for path in place.glob("checkpoint-*/model.safetensors"):
                if not all(tensor.isfinite().all() for tensor in load_file(path).values()):
                    lost.append(path.parent.name)
            survival = "training ends with finite weights" if allowed else "an error with term, step, rate and samples"
            records.append(record(f"NaN on one process, {fault}, {count(processes)}", [lost], survival))
    return records


# Bad input

REFUSALS = (
    "examples/test_bad_images",
    "models/test_configuration",
    "models/test_modeling_base",
    "models/test_untrusted",
    "training/test_checkpoints",
    "training/test_label_checks",
    "training/test_nonfinite",
    "training/test_resume",
    "training/test_seeded_data",
    "test_properties",
    "test_tasks",
)


def refusals(folder: Path, trials: int) -> list[dict]:
    """Run the tests of bad data, checkpoints, configurations and numbers, and count their cases."""
    tests = [str(Path(__file__).parents[1] / "tests" / f"{name}.py") for name in REFUSALS]
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={folder / 'tests.xml'}", *tests]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode not in (0, 1):  # all passed, or some failed
        raise RuntimeError(f"The tests could not be run: {' '.join(command)}")
    cases: dict[str, list[list[str]]] = {}
    for case in ElementTree.parse(folder / "tests.xml").iter("testcase"):
        name = case.get("name").partition("[")
        failed = [child.tag for child in case if child.tag in ("failure", "error")]
        cases.setdefault(name[0].removeprefix("test_").replace("_", " "), []).append(
            [name[2] or "it"] if failed else []
        )
    return [record(fault, results, "the test of this name passes") for fault, results in cases.items()]


# Leaks


def leaks(folder: Path, trials: int) -> list[dict]:
    """Measure the memory of this process over thousands of steps, evaluations of images and early exits."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 5} for index in range(64)]
    model = MultiExitForImageClassification.from_backbone("test_resnet", num_labels=5, exits=[1, 2])
    args = TrainingArguments(
        str(folder),
        max_steps=NUM_LEAK_STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=500,
        learning_rate=0.001,
    )
    gauge = Gauge()
    options = {"train_dataset": images, "eval_dataset": images, "callbacks": [gauge], "ema_decay": 0.9}
    trainer = SelfDistillationTrainer(model, args, "frskd", max_skipped_batches=1, **options)
    trainer.train()
    records = [gauge.record("training steps (FRSKD, batch of 2, weight average)")]
    gauge.readings = []
    for _ in range(NUM_LEAK_STEPS // 32):
        trainer.evaluate()
        gauge.read(32)
    records.append(gauge.record("evaluation steps (batch of 2)"))
    gauge.readings = []
    model.eval()
    policy = ExitPolicy(thresholds=[0.25, 0.25])
    batch = torch.stack([image["pixel_values"] for image in images[:8]])
    for step in range(NUM_LEAK_STEPS):
        model.early_exit(batch[: 1 + step % 8], policy)
        gauge.read(1)
    records.append(gauge.record("calls of early_exit (1 to 8 images)"))
    return records


def report(results: dict[str, list[dict]]) -> str:
    """Return the tables."""
    faults = [
        {
            "fault": entry["fault"],
            "tried": entry["tried"],
            "survived": entry["survived"],
            "survived means": entry["survival"],
            "lost": ", ".join(entry["lost"]) or "nothing",
        }
        for part in ("kill", "sigterm", "disk", "numbers")
        for entry in results.get(part, [])
    ]
    cases = [
        {"refused or handled": entry["fault"], "cases": entry["tried"], "as documented": entry["survived"]}
        for entry in results.get("refusals", [])
    ]
    sections = {
        "Faults injected into the example": faults,
        "Bad data, checkpoints, configurations and numbers, by the tests of these names": cases,
        "Memory over long runs": results.get("leaks", []),
    }
    tables = [f"## {title}\n\n{to_table(rows)}\n" for title, rows in sections.items() if rows]
    return "\n".join(["# Robustness\n", "Written by `benchmarks/robustness.py`, on the CPU.\n", *tables])


PARTS = {
    "kill": kill,
    "sigterm": sigterm,
    "disk": disk,
    "numbers": numbers,
    "refusals": refusals,
    "leaks": leaks,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="Folder for robustness.json and robustness.md.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--trials", type=int, default=4, help="Of every fault that depends on chance.")
    options = parser.parse_args()
    file = options.output / "robustness.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            results[part] = PARTS[part](Path(folder), options.trials)
        file.write_text(json.dumps(results, indent=1) + "\n")
        (options.output / "robustness.md").write_text(report(results))


if __name__ == "__main__":
    main()
