"""Run the example in processes of its own, and compare their results. Used by robustness.py."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_cifar.py"
OPTIONS = {
    "dataset": "digits",
    "max_train_samples": 64,
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
NUM_STEPS = 16
PROCESSES = (1, 2)
SCAFFOLDED = {"method": "frskd"}  # a self-teacher with weights and statistics of its own


class Run:
    """A run of the example in processes of its own.

    Args:
        folder: Its ``--output_dir``.
        processes: 1 or 2.
        before: Called in the process before it starts.
        options: Override or extend ``OPTIONS``.
    """

    def __init__(self, folder: Path, processes: int = 1, before: Callable | None = None, **options):
        arguments = [f"--{name}={value}" for name, value in (OPTIONS | options | {"output_dir": folder}).items()]
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = open(f"{folder}.log", "a+")
        self.process = subprocess.Popen(
            [sys.executable, *launcher(processes), str(EXAMPLE), *arguments],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            preexec_fn=before,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def kill(self, with_signal: int) -> None:
        """Send a signal to all its processes: the launcher's are in sessions of their own."""
        if self.process.poll() is None:
            parent = psutil.Process(self.process.pid)
            family = [parent, *parent.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    process.send_signal(with_signal)
            psutil.wait_procs(family[1:])  # wait() asks for the status of the first

    def wait(self) -> int:
        """Return how it ended."""
        return self.process.wait()

    @property
    def printed(self) -> str:
        """The output of this run and of the earlier ones in its folder."""
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
    """Return the tensors that a run saved, and its log without times."""
    checkpoint = folder / f"checkpoint-{NUM_STEPS}"
    tensors = {"shipped": load_file(folder / "model.safetensors")}
    for name in ("model", "ema", "scaffold"):
        tensors[name] = load_file(checkpoint / f"{name}.safetensors")
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    tensors["optimizer"] = {(index, key): value for index, state in optimizer.items() for key, value in state.items()}
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second")
    log = [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in log]
    return {"tensors": tensors, "log": log}


def differences(folder: Path, reference: dict) -> list[str]:
    """List the results that are not bit-identical to the reference."""
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
    """List the files in a run's folder that are neither a complete checkpoint nor a result."""
    return [] if not (folder / "_incomplete").exists() else ["_incomplete"]


def launcher(processes: int) -> list[str]:
    """Return the command that starts a script in several processes."""
    if processes == 1:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]


def count(processes: int) -> str:
    """Format a number of processes."""
    return "1 process" if processes == 1 else f"{processes} processes"


def teacher(folder: Path) -> dict:
    """Train the teacher that LSH mimics, once."""
    path = folder / "teacher"
    if not path.exists():
        finish(path, method="none", num_train_epochs=1)
    return {"teacher": str(path)}


class Gauge(TrainerCallback):
    """Reads the memory that the process holds, and its open files."""

    def __init__(self):
        self.readings: list[tuple[int, float, int]] = []

    def read(self, steps: int) -> None:
        """Note the state after some more steps."""
        process = psutil.Process()
        done = steps + (self.readings[-1][0] if self.readings else 0)
        self.readings.append((done, process.memory_info().rss / 2**20, process.num_fds()))

    def on_step_end(self, args, state, control, **kwargs):
        """Note the state after a step of training."""
        self.read(1)

    def record(self, what: str) -> dict:
        """Compare the second half with the second quarter: at first, caches fill."""
        count = len(self.readings)
        middle, late = self.readings[count // 4 : count // 2], self.readings[count // 2 :]
        early_mib, late_mib = max(mib for _, mib, _ in middle), max(mib for _, mib, _ in late)
        result = {
            "what": what,
            "steps": self.readings[-1][0],
            "second quarter (MiB)": round(early_mib, 1),
            "second half (MiB)": round(late_mib, 1),
            "open files": f"{middle[0][2]} to {late[-1][2]}",
        }
        print(result, flush=True)
        return result
