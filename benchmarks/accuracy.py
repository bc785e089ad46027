"""Accuracy of every method on CIFAR-10 at convergence: same network, recipe and seeds, several protocols.

    python benchmarks/accuracy.py --dataset path/to/cifar10 --protocol cifar10-5k-100 --work_dir runs/accuracy

Each run leaves one JSON under `results/accuracy/<protocol>/`. Runs that are there are not repeated, and one that was
cut off continues from its checkpoint in `--work_dir`, bit for bit on the same kind of machine. `--time_limit 9m` stops
at the first step after that time, so that the study can be spread over many short sessions. Table and plot are drawn
from the runs that are there; without `--dataset` nothing else is done.
"""

import argparse
import json
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accuracy_report import summarise
from torch import Tensor
from torchvision.transforms import v2
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState

from hf_selfkd import (
    Method,
    MultiExitForImageClassification,
    SelfDistillationTrainer,
    __version__,
    exit_costs,
    get_method,
    list_methods,
)
from hf_selfkd.evaluation.costs import exit_parameters
from hf_selfkd.training.checkpoints import find_last_checkpoint

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
PADDING = 4  # of the random crop, in pixels
METHODS = ("none", "deep_supervision", "byot", "eed", "lsh", "okd_mde", "frskd", "dks", "ps_kd", "uskd")
CONTROLS = ("label_smoothing", "mixup", "cutmix")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All that runs have in common but configuration and seed.

    The network is a ResNet with a 3x3 stem and the library's default exits. SGD with Nesterov momentum 0.9; the
    learning rate rises linearly over the first twentieth of the steps and falls along a cosine to zero. Random crops
    with a padding of 4 pixels, horizontal flips.

    Args:
        train_images: The first so many of the training images.
        epochs: Length of a run, a multiple of ``eval_epochs``.
        batch_size: Images per step, a divisor of ``train_images``: a small last batch would spoil batch norm.
        learning_rate: Its peak.
        seeds: Of initialisation, order and augmentation.
        bf16: Whether to train in mixed precision, which takes ten times as long on CPUs without its instructions.
        eval_epochs: Epochs between evaluations on the 10,000 test images.
        weight_decay: On all parameters.
        network: Arguments of timm's ``resnet18``.
    """

    train_images: int
    epochs: int
    batch_size: int
    learning_rate: float
    seeds: tuple[int, ...]
    bf16: bool
    eval_epochs: int
    weight_decay: float = 5e-4
    network: dict[str, list[int]] = field(
        default_factory=lambda: {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}
    )

    def facts(self) -> dict:
        """Return what runs must share to be compared, as JSON has it."""
        return {name: value for name, value in asdict(self).items() if name != "seeds"}

    def describe(self) -> str:
        """Return what was done, in words."""
        return (
            f"CIFAR-10, {self.train_images:,} training images, {self.epochs} epochs, ResNet with "
            f"{'-'.join(map(str, self.network['channels']))} channels and "
            f"{'-'.join(map(str, self.network['layers']))} blocks, 3x3 stem, "
            f"{'bfloat16 autocast' if self.bf16 else 'float32'}, batches of {self.batch_size}, SGD with Nesterov "
            f"momentum 0.9, learning rate {self.learning_rate:g} with 5 % linear warm-up and cosine decay to zero, "
            f"weight decay {self.weight_decay:g}, random crop (padding {PADDING}) and horizontal flip, "
            f"{len(self.seeds)} seeds."
        )


PROTOCOLS = {
    "cifar10-5k-100": Protocol(
        train_images=5_000, epochs=100, batch_size=50, learning_rate=0.05, seeds=(0, 1, 2), bf16=False, eval_epochs=5
    ),
    "cifar10-narrow-30": Protocol(
        train_images=50_000, epochs=30, batch_size=125, learning_rate=0.1, seeds=(0, 1), bf16=False, eval_epochs=1
    ),
}


# Data


class Images(torch.utils.data.Dataset):
    """Images in memory, as integers, which the trainer normalises.

    Args:
        images: ``(images, 3, height, width)``, uint8.
        labels: Class indices ``(images,)``.
        augments: Whether to return random crops of the padded image, half of them mirrored.
    """

    def __init__(self, images: Tensor, labels: Tensor, augments: bool):
        self.size = images.shape[-1]
        self.images = F.pad(images, [PADDING] * 4) if augments else images
        self.labels = labels.tolist()
        self.augments = augments

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        image = self.images[index]
        if self.augments:
            top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
            image = image[:, top : top + self.size, left : left + self.size]
            image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return {"pixel_values": image, "labels": self.labels[index]}


def load(dataset: str, train_images: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Decode the splits ``train`` and ``test`` into images ``(images, 3, 32, 32)`` and labels ``(images,)``."""
    from data import DataArguments, LabelledImages, load_images

    splits, _ = load_images(DataArguments(dataset=dataset))
    splits["train"] = splits["train"].select(range(train_images))
    decoded = {}
    for name, split in splits.items():
        samples = list(LabelledImages(split, v2.functional.pil_to_tensor))
        images = torch.stack([sample["pixel_values"] for sample in samples])
        decoded[name] = images, torch.tensor([sample["labels"] for sample in samples])
    return decoded


# Runs


class Clock(TrainerCallback, ExportableState):
    """Seconds that a run has trained, over all its pieces; evaluation and checkpoints are left out."""

    def __init__(self):
        self.seconds = {"wall": 0.0, "cpu": 0.0}

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": dict(self.seconds)}}

    def on_train_begin(self, args, state, control, **kwargs):
        """Continue from the seconds in the checkpoint."""
        self.seconds = dict(state.stateful_callbacks[type(self).__name__]["attributes"]["seconds"])
        self._start()

    def on_step_end(self, args, state, control, **kwargs):
        """Add what a step took, its data included."""
        self.seconds["wall"] += time.perf_counter() - self._wall
        self.seconds["cpu"] += time.process_time() - self._cpu
        self._start()

    def _start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_evaluate(self, args, state, control, **kwargs):
        """Leave out what the evaluation took."""
        self._start()

    def on_save(self, args, state, control, **kwargs):
        """Leave out what the checkpoint took."""
        self._start()


class Deadline(TrainerCallback):
    """Ends the process as SIGTERM does, with a checkpoint, at a time of the monotonic clock."""

    def __init__(self, time: float):
        self.time = time

    def on_step_end(self, args, state, control, **kwargs):
        """Check the time."""
        if time.monotonic() >= self.time:
            signal.raise_signal(signal.SIGTERM)


class Progress(TrainerCallback):
    """Prints the accuracies of every evaluation."""

    def __init__(self, run: str):
        self.run = run

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Print them in percent."""
        accuracies = " ".join(f"{name} {100 * value:.2f}" for name, value in pick(metrics, "accuracy").items())
        print(f"{time.strftime('%H:%M')} {self.run} epoch {state.epoch:g}: {accuracies}", flush=True)


def configure(name: str, epochs: int) -> tuple[Method, float, Callable | None]:
    """Return method, label smoothing and mixing of a configuration: a method, a control, or ``method+control``."""
    parts = name.split("+")
    controls = [part for part in parts if part in CONTROLS]
    [method] = [part for part in parts if part not in CONTROLS] or ["none"]
    hyper_parameters = {
        "okd_mde": {"ramp_epochs": epochs * 80 / 300},  # as in its family
        "ps_kd": {"ramp_epochs": epochs},
        "uskd": {"target_weight": 0.1, "weak_weight": 0.1},  # the authors' for CIFAR-100
    }
    mixes = {"mixup": v2.MixUp(alpha=1.0, num_classes=10), "cutmix": v2.CutMix(alpha=1.0, num_classes=10)}
    mix = next((mixes[control] for control in controls if control in mixes), None)
    return get_method(method, **hyper_parameters.get(method, {})), 0.1 * ("label_smoothing" in controls), mix


def build_model(protocol: Protocol) -> MultiExitForImageClassification:
    from data.arguments import CIFAR_MEAN, CIFAR_STD

    model = MultiExitForImageClassification.from_backbone(
        "resnet18", num_labels=10, backbone_kwargs=protocol.network, small_input_stem=True
    )
    model.config.pretrained_cfg |= {"input_size": [3, 32, 32], "mean": CIFAR_MEAN, "std": CIFAR_STD}
    return model.to(memory_format=torch.channels_last)


def recipe(protocol: Protocol, folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=protocol.epochs,
        per_device_train_batch_size=protocol.batch_size,
        per_device_eval_batch_size=500,
        optim="sgd",
        optim_args="momentum=0.9,nesterov=true",
        learning_rate=protocol.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=protocol.weight_decay,
        max_grad_norm=0.0,
        bf16=protocol.bf16,
        use_cpu=not torch.accelerator.is_available(),
        eval_strategy="steps",
        eval_steps=protocol.eval_epochs * (protocol.train_images // protocol.batch_size),
        logging_strategy="no",
        save_strategy="epoch",
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def train(protocol: Protocol, name: str, seed: int, data: dict, folder: Path, deadline: float) -> dict:
    """Train once, or continue, and return the facts of the run.

    Raises:
        SystemExit: After ``deadline``, once a checkpoint is written to ``folder``.
    """
    method, label_smoothing, mix = configure(name, protocol.epochs)
    set_seed(seed)
    model = build_model(protocol)
    costs, parameters = exit_costs(model), exit_parameters(model)
    clock = Clock()
    trainer = SelfDistillationTrainer(
        model,
        recipe(protocol, folder, seed=seed, label_smoothing_factor=label_smoothing),
        method,
        train_dataset=Images(*data["train"], augments=True),
        eval_dataset=Images(*data["test"], augments=False),
        mix=mix,
        decay_norms=True,
        save_on_sigterm=True,
        callbacks=[clock, Deadline(deadline), Progress(f"{name} seed {seed}")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=find_last_checkpoint(str(folder)) if folder.is_dir() else None)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    best = max(history, key=lambda entry: entry["eval_accuracy"])
    return {
        "configuration": name,
        "seed": seed,
        "protocol": protocol.facts(),
        "method": method.to_dict(),
        "accuracy": pick(history[-1], "accuracy"),
        "calibration_error": pick(history[-1], "calibration_error"),
        "loss": history[-1]["eval_loss"],
        "best": {"epoch": best["epoch"], "accuracy": pick(best, "accuracy")},
        "history": [{"epoch": entry["epoch"], **pick(entry, "accuracy")} for entry in history],
        "exits": {
            "stages": model.exit_stages,
            "heads": [type(head).__name__ for head in model.exits],
            "multiply_adds": costs,
            "parameters": parameters,
        },
        "minutes": {name: round(seconds / 60, 3) for name, seconds in clock.seconds.items()},
        "versions": {"hf_selfkd": __version__, "torch": torch.__version__},
        "device": device_name(),
        "on_cpu": trainer.args.device.type == "cpu",
    }


def pick(metrics: dict, kind: str) -> dict[str, float]:
    """Return a metric of every exit, first to last, and of the ensemble."""
    found = {re.fullmatch(rf"eval_(exit_\d+|ensemble)_{kind}", name): value for name, value in metrics.items()}
    return {match[1]: value for match, value in found.items() if match}


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


# Command line


def seconds(text: str) -> float:
    """Read a duration such as ``90s``, ``9m`` or ``1.5h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a duration such as 90s, 9m or 1.5h, but got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="a local folder of CIFAR-10, or cifar10 for the Hub; none: summary only")
    parser.add_argument("--protocol", default="cifar10-5k-100", choices=PROTOCOLS)
    parser.add_argument("--configurations", nargs="+", default=[*METHODS, *CONTROLS], help="also byot+cutmix and such")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the protocol")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/accuracy"), help="where checkpoints are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--time_limit", type=seconds, default=float("inf"), help="such as 9m; default: none")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.time_limit
    protocol = PROTOCOLS[options.protocol]
    folder = options.results / options.protocol
    folder.mkdir(parents=True, exist_ok=True)
    if options.dataset:
        run_all(options, protocol, folder, deadline)
    print(report(options.protocol, folder))


def report(name: str, folder: Path) -> str:
    """Write table and plot, and return the table."""
    protocol = PROTOCOLS[name]
    description = f"Protocol `{name}`: {protocol.describe()}"
    return summarise(folder, protocol.facts(), len(protocol.seeds), description, [*METHODS, *CONTROLS])


def run_all(options: argparse.Namespace, protocol: Protocol, folder: Path, deadline: float) -> None:
    """Make the runs that are not there, until the deadline."""
    unknown = [name for name in options.configurations if not {*name.split("+")} <= {*list_methods(), *CONTROLS}]
    if unknown:
        print(f"Left out, because the library has no such method: {', '.join(unknown)}.", flush=True)
    names = [name for name in options.configurations if name not in unknown]
    todo = [(name, seed) for seed in options.seeds or protocol.seeds for name in names]
    todo = [(name, seed) for name, seed in todo if not (folder / f"{name}-seed{seed}.json").exists()]
    data = load(options.dataset, protocol.train_images) if todo else {}
    for name, seed in todo:
        work = options.work_dir / options.protocol / f"{name}-seed{seed}"
        try:
            facts = train(protocol, name, seed, data, work, deadline)
        except SystemExit:
            if time.monotonic() < deadline:
                raise  # told to end by someone else
            print(f"Time is up in {name} seed {seed}. The same command continues.", flush=True)
            return
        (folder / f"{name}-seed{seed}.json").write_text(json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(work)
        report(options.protocol, folder)


if __name__ == "__main__":
    main()
