"""Try what goes wrong in long runs, and write down what was survived and what was lost.

    python benchmarks/robustness.py --output benchmarks/results                 # everything
    python benchmarks/robustness.py --parts kill leaks --output benchmarks/results

Every fault is done to the example as a user runs it, in processes of their own, on the CPU. Results of parts that are
not run again stay in the file.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from hf_selfkd.evaluation import to_table

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_cifar.py"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")
OPTIONS = {
    "dataset": "digits",
    "max_train_samples": 128,
    "max_eval_samples": 32,
    "backbone": "test_resnet",
    "num_train_epochs": 4,
    "lr_milestones": 3,
    "per_device_train_batch_size": 16,
    "learning_rate": 0.02,
    "ema_decay": 0.9,
    "auto_augment": "randaugment",
    "random_erasing": 0.5,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "logging_strategy": "steps",
    "logging_steps": 2,
    "use_cpu": "true",
    "disable_tqdm": "true",
    "resume_from_checkpoint": "last",
}
NUM_STEPS = 32
PROCS = (1, 2)
SCAFFOLDED = {"method": "frskd"}  # a self-teacher with weights and statistics of its own
SIGTERMED = 143


class Run:
    """A run of the example in processes of its own.

    Args:
        folder: Its ``--output_dir``.
        processes: 1 or 2.
        before: Called in the process before it starts.
        options: In the place of or beside ``OPTIONS``.
    """

    def __init__(self, folder: Path, processes: int = 1, before: Callable | None = None, **options):
        launcher = [] if processes == 1 else [*TWO_PROCESSES, str(random.SystemRandom().randint(20000, 60000))]
        arguments = [f"--{name}={value}" for name, value in (OPTIONS | options | {"output_dir": folder}).items()]
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = open(f"{folder}.log", "a+")
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(EXAMPLE), *arguments],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            preexec_fn=before,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def kill(self, with_signal: int) -> None:
        """Send a signal to all its processes: the launcher's are in sessions of their own."""
        if self.process.poll() is None:
            launcher = psutil.Process(self.process.pid)
            family = [launcher, *launcher.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    process.send_signal(with_signal)
            psutil.wait_procs(family)

    def wait(self) -> int:
        """Return how it ended."""
        return self.process.wait()

    @property
    def printed(self) -> str:
        """What it and the runs before it in this folder printed."""
        self.log.flush()
        return Path(self.log.name).read_text()

    def wait_for(self, path: str) -> None:
        """Wait until a file matches the pattern, or the run is over."""
        while self.process.poll() is None and not any(self.folder.glob(path)):
            time.sleep(0.0005)


def finish(folder: Path, **options) -> Run:
    """Run to the end."""
    run = Run(folder, **options)
    if run.wait() != 0:
        raise RuntimeError(f"The run did not end as it should: {run.printed[-3000:]}")
    return run


def outcome(folder: Path) -> dict:
    """What a run left: tensors of every kind, and the log without times."""
    checkpoint = folder / f"checkpoint-{NUM_STEPS}"
    tensors = {"shipped": load_file(folder / "model.safetensors")}
    for name in ("model", "ema", "scaffold"):
        tensors[name] = load_file(checkpoint / f"{name}.safetensors")
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    tensors["optimizer"] = {f"{index}/{key}": value for index, state in optimizer.items() for key, value in state.items()}
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second")
    log = [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in log]
    return {"tensors": tensors, "log": log}


def differences(folder: Path, reference: dict) -> list[str]:
    """Name what is not bit-identical to the reference."""
    found = outcome(folder)
    differing = []
    for kind, tensors in reference["tensors"].items():
        other = found["tensors"][kind]
        if tensors.keys() != other.keys() or any(
            not torch.equal(torch.as_tensor(tensor), torch.as_tensor(other[name])) for name, tensor in tensors.items()
        ):
            differing.append(kind)
    return differing + ([] if found["log"] == reference["log"] else ["logged losses"])


def leftovers(folder: Path) -> list[str]:
    """Name what a run left in its folder that is neither a whole checkpoint nor a result."""
    return [] if not (folder / "_incomplete").exists() else ["_incomplete"]


def record(fault: str, trials: list[list[str]], survival: str) -> dict:
    """Sum up trials, each a list of what was lost."""
    lost = sorted({what for trial in trials for what in trial})
    survived = sum(not trial for trial in trials)
    print(f"{fault}: {survived} of {len(trials)} survived; lost: {', '.join(lost) or 'nothing'}", flush=True)
    return {"fault": fault, "tried": len(trials), "survived": survived, "survival": survival, "lost": lost}


# kill -9


def kill(folder: Path, trials: int) -> list[dict]:
    """Kill runs at random moments and while they write a checkpoint, and run the same command again."""
    records = []
    for processes in PROCS:
        options = SCAFFOLDED if processes == 1 else {"method": "lsh", "method_args": json.dumps(teacher(folder))}
        options |= {"processes": processes, "per_device_train_batch_size": 16 // processes}
        start = time.time()
        whole = folder / f"whole-{processes}"
        finish(whole, **options)
        reference, duration = outcome(whole), time.time() - start
        moments = {"at a random moment": [], "while a checkpoint is written": []}
        generator = random.Random(processes)
        for trial in range(trials):
            for moment, results in moments.items():
                place = folder / f"killed-{processes}-{len(results)}-{moment.split()[1]}"
                workers = {"dataloader_num_workers": trial % 3}
                run = Run(place, **options, **workers)
                if moment == "at a random moment":
                    time.sleep(generator.uniform(0.3, 1.0) * duration)
                else:
                    step = 3 * generator.randint(1, NUM_STEPS // 3)
                    run.wait_for(f"_incomplete/checkpoint-{step}/*")
                    time.sleep(generator.uniform(0, 0.05))
                run.kill(signal.SIGKILL)
                run.wait()
                finish(place, **options, **workers)
                results.append(differences(place, reference) + leftovers(place))
        for moment, results in moments.items():
            fault = f"`kill -9` {moment}, {processes} process{'es' if processes > 1 else ''}"
            survival = "the same command ends with bit-identical weights, scaffold, average, optimizer and logged losses"
            records.append(record(fault, results, survival))
    return records


def teacher(folder: Path) -> dict:
    """Train the teacher that LSH mimics, once."""
    path = folder / "teacher"
    if not path.exists():
        finish(path, method="none", num_train_epochs=1)
    return {"teacher": str(path)}


PARTS = {"kill": kill}


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
