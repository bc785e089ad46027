"""Times, size and memory of one file that exits early, against static files and against its own parts."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from early_exit import create, stage_outputs, unlike_images
from timing import ratio, time_in_turn
from torch import nn

from hf_selfkd import ExitPolicy, export_exit, export_exits
from hf_selfkd.deploy.onnx_early_exit import assemble, write_step
from hf_selfkd.deploy.segments import check_shrinks, cut_at_exits
from hf_selfkd.deploy.steps import build_steps

MODELS = {"resnet50": "ResNet-50", "vit_small_patch16_224": "ViT-S", "tf_efficientnet_lite0": "EfficientNet-Lite0"}
SIZE = 224
EXITS = 4
MIDDLE = 1
NEVER = 2.0


class Logits(nn.Module):
    """The head of an exit, without its features."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, feature_map):
        """Return logits ``(batch, classes)``."""
        return self.head(feature_map)[0]


@torch.no_grad()
def write_files(name: str, folder: Path) -> None:
    """Write the file that exits early, its steps, a static file for each exit and for all, and the heads.

    The file is what ``export_early_exit`` writes, without the comparison with the model, which takes minutes here.
    """
    if (folder / "all.onnx").exists():  # written last
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = create(name)
    policy = ExitPolicy(thresholds=[NEVER] * (EXITS - 1))
    segments = cut_at_exits(model, (SIZE, SIZE))
    check_shrinks(segments)
    steps = [write_step(step) for step in build_steps(segments, policy)]
    for exit, step in enumerate(steps):
        onnx.save(step, folder / f"step_{exit}.onnx")
    onnx.save(assemble(steps, policy.thresholds, {}, shrink=True), folder / "early_exit.onnx")
    _, maps = stage_outputs(model, torch.zeros(2, 3, SIZE, SIZE))
    for exit, (head, stage) in enumerate(zip(model.exits, model.exit_stages, strict=True)):
        batch = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            Logits(head), (maps[stage],), folder / f"head_{exit}.onnx", dynamic_shapes=batch, external_data=False
        )
    for exit in range(EXITS):
        export_exit(model, exit, folder / f"exit_{exit}.onnx", image_size=SIZE)
    export_exits(model, folder / "all.onnx", image_size=SIZE)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open a file with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Files:
    """Sessions of all files of a folder, as functions on images.

    Args:
        folder: What :func:`write_files` wrote.
        images: ``(images, channels, height, width)``, which are given to the files in batches.
        batch_size: Images per batch.
    """

    def __init__(self, folder: Path, images: np.ndarray, batch_size: int):
        self.sessions = {path.stem: open_session(path) for path in folder.glob("*.onnx")}
        self.images, self.batch_size = images, batch_size
        self.tensors, self.scores = [(images,)], []
        for exit in range(EXITS):  # what every step reads
            _, scores, _, *tensors = self.run(f"step_{exit}", *self.tensors[-1])
            self.scores.append(scores)
            self.tensors.append(tuple(tensors))

    def run(self, name: str, *tensors: np.ndarray) -> list[np.ndarray]:
        """Run a file on tensors."""
        session = self.sessions[name]
        names = [argument.name for argument in session.get_inputs()]
        return session.run(None, dict(zip(names, tensors, strict=True)))

    def batches(self, name: str, *tensors: np.ndarray) -> None:
        """Run a file on tensors in batches."""
        for start in range(0, len(tensors[0]), self.batch_size):
            self.run(name, *(tensor[start : start + self.batch_size] for tensor in tensors))

    def thresholds(self, exits: dict[int, int]) -> np.ndarray:
        """Return thresholds at which so many images exit at each exit, and the others at the final one."""
        thresholds, left = [], np.full(len(self.images), True)
        for exit in range(EXITS - 1):
            scores = np.sort(self.scores[exit][left])[::-1]
            count = exits.get(exit, 0)
            if count == len(scores):
                thresholds.append(0.0)
            else:
                thresholds.append(scores[count - 1 : count + 1].mean() if count else NEVER)
            left &= self.scores[exit] < thresholds[-1]
        return np.array(thresholds, dtype=np.float32)

    def early_exit(self, thresholds: np.ndarray) -> np.ndarray:
        """Run the file that exits early, and return the exits."""
        found = []
        for start in range(0, len(self.images), self.batch_size):
            batch = {"pixel_values": self.images[start : start + self.batch_size], "thresholds": thresholds}
            found.append(self.sessions["early_exit"].run(["exit_index"], batch)[0])
        return np.concatenate(found)

    def host(self, thresholds: np.ndarray) -> np.ndarray:
        """Run one static file per exit, each on the images that the earlier ones were not confident about."""
        found = []
        for start in range(0, len(self.images), self.batch_size):
            images = self.images[start : start + self.batch_size]
            rows, exits = np.arange(len(images)), np.full(len(images), EXITS - 1)
            for exit, threshold in enumerate(thresholds):
                if threshold >= NEVER:
                    continue
                [logits] = self.run(f"exit_{exit}", images[rows])
                logits = np.exp(logits - logits.max(axis=1, keepdims=True))
                go = logits.max(axis=1) / logits.sum(axis=1) >= threshold
                exits[rows[go]] = exit
                rows = rows[~go]
                if not len(rows):
                    break
            else:
                self.run(f"exit_{EXITS - 1}", images[rows])
            found.append(exits)
        return np.concatenate(found)


def times(name: str, folder: Path, batch_size: int, rounds: int) -> dict[str, Any]:
    """Time a model with batches of a size, and return ratios of CPU times in the same round."""
    count = max(EXITS, batch_size)
    files = Files(folder, unlike_images(count, SIZE).numpy(), batch_size)
    never = files.thresholds({})
    half = files.thresholds({MIDDLE: count // 2})
    spread = files.thresholds({exit: count // EXITS for exit in range(EXITS - 1)})
    for thresholds in (never, half, spread):
        assert (files.early_exit(thresholds) == files.host(thresholds)).all()
    few = np.flatnonzero(files.scores[MIDDLE] < half[MIDDLE])
    candidates = {
        "nobody": lambda: files.early_exit(never),
        "half": lambda: files.early_exit(half),
        "spread": lambda: files.early_exit(spread),
        "host half": lambda: files.host(half),
        "host spread": lambda: files.host(spread),
        "plain": lambda: files.batches(f"exit_{EXITS - 1}", files.images),
        "all": lambda: files.batches("all", files.images),
    }
    maps = _feature_maps(name, files.images)
    for exit in range(EXITS - 1):
        candidates[f"head {exit}"] = lambda exit=exit: files.batches(f"head_{exit}", maps[exit])
    # Of a batch, half continues: as many images as in half of the batches, but batches of half the size.
    files_few = lambda exit: _halves(files, exit, few)  # noqa: E731
    for exit in range(EXITS):
        tensors = files.tensors[exit]
        candidates[f"step {exit}"] = (
            (lambda exit=exit, tensors=tensors: files.batches(f"step_{exit}", *tensors))
            if exit <= MIDDLE
            else (lambda exit=exit: files_few(exit))
        )
    measured = time_in_turn(candidates, rounds)
    heads = [(1.0, f"head {exit}") for exit in range(EXITS - 1)]
    steps = [(1.0, f"step {exit}") for exit in range(EXITS)]
    parts = [(1.0, "plain"), *heads]
    row: dict[str, Any] = {"model": MODELS[name], "batch": batch_size, "rounds": rounds}
    for clock in ("cpu", "wall"):
        row[f"nobody exits, over the network and its heads ({clock})"] = 1 / ratio(measured, parts, "nobody", clock)
        row[f"nobody exits, over all exits in one static file ({clock})"] = ratio(
            measured, [(1.0, "nobody")], "all", clock
        )
        row[f"half exits, realised over implied ({clock})"] = ratio(measured, steps, "half", clock)
        row[f"half exits, times faster than plain ({clock})"] = ratio(measured, [(1.0, "plain")], "half", clock)
        for case in ("half", "spread"):
            row[f"{case}, times faster than one file per exit ({clock})"] = ratio(
                measured, [(1.0, f"host {case}")], case, clock
            )
    row["milliseconds per image (cpu)"] = {
        candidate: 1000 * median(clocks["cpu"]) / count for candidate, clocks in measured.items()
    }
    return row


def _feature_maps(name: str, images: np.ndarray) -> list[np.ndarray]:
    model = create(name)
    _, maps = stage_outputs(model, torch.from_numpy(images))
    return [maps[stage].contiguous().numpy() for stage in model.exit_stages]


def _halves(files: Files, exit: int, rows: np.ndarray) -> None:
    """Run a step on the images that are left, in batches of half the size."""
    tensors = [tensor[rows] for tensor in files.tensors[exit]]
    size = max(1, files.batch_size // 2)
    for start in range(0, len(rows), size):
        files.run(f"step_{exit}", *(tensor[start : start + size] for tensor in tensors))


_MEMORY = """
import json, resource, sys
import numpy, onnxruntime
def kib(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])
before = kib("VmRSS")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(2):
    session.run(None, {"pixel_values": numpy.zeros((int(sys.argv[2]), 3, 224, 224), dtype="float32")})
print(json.dumps([kib("VmRSS") - before, kib("VmHWM") - before]))
"""


def sizes(name: str, folder: Path) -> dict[str, Any]:
    """Compare bytes on disk and in memory with those of all exits in one static file, where nobody exits."""
    row: dict[str, Any] = {"model": MODELS[name]}
    files = [folder / "early_exit.onnx", folder / "all.onnx"]
    row["file"] = files[0].stat().st_size / files[1].stat().st_size
    for batch_size in (1, 16):
        command = [sys.executable, "-c", _MEMORY]
        held = [
            json.loads(subprocess.check_output([*command, file, str(batch_size)], text=True).splitlines()[-1])
            for file in files
        ]
        row[f"memory, batch of {batch_size}"] = held[0][0] / held[1][0]
        row[f"peak memory, batch of {batch_size}"] = held[0][1] / held[1][1]
        row[f"MiB, batch of {batch_size}"] = [[round(value / 1024) for value in pair] for pair in held]
    return row
