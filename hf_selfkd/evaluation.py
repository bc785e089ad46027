"""What early exit costs and earns: multiply-adds and milliseconds per exit, curves of accuracy against cost."""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from .backbone import run
from .calibration import gather_evidence, solve
from .early_exit import ExitPolicy


class _Meter:
    """Visitor that lets nobody leave, and reads a meter when an exit has answered and its answers are scored."""

    def __init__(self, model: PreTrainedModel, image_size: tuple[int, int], read: Callable[[], float]):
        self.policy = ExitPolicy(thresholds=[2.0] * (model.num_exits - 1))
        self.exits = {stage: exit for exit, stage in enumerate(model.exit_stages)}
        self.answer = partial(model._exit_logits, image_size)
        self.read = read
        self.readings: list[float] = []

    def __call__(self, stage: int, output: Any) -> None:
        if stage in self.exits:
            exit = self.exits[stage]
            self.policy.score(exit, self.answer(exit, output))
            self.readings.append(self.read())


@torch.no_grad()
def _read_at_exits(model: PreTrainedModel, images: Tensor, read: Callable[[], float]) -> list[float]:
    """Run images through all exits and read a meter at each of them."""
    meter = _Meter(model, tuple(images.shape[-2:]), read)
    logits = run(model.backbone, model.anatomy, images, meter)
    meter.policy.score(model.num_exits - 1, logits)
    return [*meter.readings, read()]


def _image_shape(model: PreTrainedModel, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    channels, height, width = model.config.pretrained_cfg["input_size"]
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return channels, height, width


def exit_costs(model: PreTrainedModel, image_size: int | tuple[int, int] | None = None) -> list[int]:
    """Count the multiply-adds that an image has cost when it leaves at each exit, the heads on its way included.

    Counted by torch's own FLOP counter on the meta device, where it sees every operator, fused attention too.

    Args:
        model: A multi-exit model for classification.
        image_size: Side of the image, or height and width, in pixels; ``None`` for the one the model is meant for.

    Returns:
        One number per exit, shallow to deep.
    """
    twin, images = _meta_twin(model, image_size)
    with FlopCounterMode(display=False) as counter:
        operations = _read_at_exits(twin, images, counter.get_total_flops)
    return [round(count / 2) for count in operations]  # torch counts a multiply-add as two operations


def exit_parameters(model: PreTrainedModel) -> list[int]:
    """Count the parameters that an image has met when it leaves at each exit, the heads on its way included.

    Args:
        model: A multi-exit model for classification.

    Returns:
        One number per exit, shallow to deep; the last is that of all parameters that ship.
    """
    twin, images = _meta_twin(model, None)
    met: dict[nn.Parameter, None] = {}
    for module in twin.modules():
        module.register_forward_pre_hook(lambda module, _: met.update(dict.fromkeys(module.parameters(recurse=False))))
    *early, _ = _read_at_exits(twin, images, lambda: sum(parameter.numel() for parameter in met))
    return [*early, sum(parameter.numel() for parameter in twin.parameters())]


def _meta_twin(model: PreTrainedModel, image_size: int | tuple[int, int] | None) -> tuple[PreTrainedModel, Tensor]:
    """Build the model and an image without memory: a call of it costs nothing."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config)).eval()
        return twin, torch.empty(1, *_image_shape(model, image_size))


def exit_latencies(
    model: PreTrainedModel,
    image_size: int | tuple[int, int] | None = None,
    *,
    batch_size: int = 1,
    repeats: int = 30,
) -> list[float]:
    """Measure the milliseconds after which a batch can leave at each exit, on the device that the model is on.

    Heads on the way and the decisions are included. With these as ``costs``, the ``target_cost`` for a budget of so
    many milliseconds is the budget over the last of them.

    Args:
        model: A multi-exit model for classification, in eval mode.
        image_size: Side of the image, or height and width, in pixels; ``None`` for the one the model is meant for.
        batch_size: Images at once; the times are those of the batch.
        repeats: Runs whose median is taken, after a tenth as many to warm up.

    Returns:
        One number per exit, shallow to deep.
    """
    images = torch.randn(batch_size, *_image_shape(model, image_size)).to(model.device, model.dtype)
    clock = partial(_milliseconds, images.device)
    runs = []
    for _ in range(-(-repeats // 10) + repeats):
        start = clock()
        runs.append([reading - start for reading in _read_at_exits(model, images, clock)])
    return [median(times) for times in zip(*runs[-repeats:], strict=True)]


def _milliseconds(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() * 1000


def measure_throughput(
    model: PreTrainedModel,
    pixel_values: Tensor,
    policy: ExitPolicy,
    costs: Sequence[float],
    *,
    repeats: int = 10,
) -> dict[str, float]:
    """Measure what early exit saves on a batch beside what counting says it saves.

    Args:
        model: A multi-exit model for classification, in eval mode.
        pixel_values: Real images ``(batch, channels, height, width)``: made-up ones leave elsewhere.
        policy: When an image may leave.
        costs: Cost of an image that leaves at each exit, such as :func:`exit_costs`.
        repeats: Runs of each kind, in turn, whose medians are compared.

    Returns:
        ``images_per_second`` and ``plain_images_per_second`` of the backbone alone, ``realised_speedup``, their ratio,
        and ``counted_speedup``, full cost over mean cost.
    """
    clock = partial(_milliseconds, pixel_values.device)
    candidates = [partial(model.early_exit, pixel_values, policy), partial(model.backbone, pixel_values)]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        exit_index = candidates[0]().exit_index
        candidates[1]()
        for _ in range(repeats):
            for candidate, measured in zip(candidates, times, strict=True):
                start = clock()
                candidate()
                measured.append(clock() - start)
    early, plain = (1000 * len(pixel_values) / median(measured) for measured in times)
    mean_cost = sum(costs[exit] for exit in exit_index.tolist()) / len(pixel_values)
    return {
        "images_per_second": early,
        "plain_images_per_second": plain,
        "realised_speedup": early / plain,
        "counted_speedup": costs[-1] / mean_cost,
    }


@torch.no_grad()
def collect_logits(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Run all exits on labelled images.

    Args:
        model: A multi-exit model for classification, in eval mode.
        batches: Dictionaries with ``pixel_values`` and ``labels``, such as a ``DataLoader`` yields.

    Returns:
        Logits ``(exits, images, classes)`` in float32 and labels ``(images,)``, on the CPU.

    Raises:
        ValueError: If the model is in training mode.
    """
    if model.training:
        raise ValueError("collect_logits needs a model in eval mode, but it is in training mode. Call model.eval().")
    logits, labels = [], []
    for batch in batches:
        targets = batch["labels"].to(model.device)
        output = model(batch["pixel_values"].to(model.device), labels=targets)  # labels: all exits, whatever config
        logits.append(torch.stack(output.exit_logits).float().cpu())
        labels.append(targets.cpu())
    return torch.cat(logits, dim=1), torch.cat(labels)


def anytime_curve(exit_logits: Tensor, labels: Tensor, costs: Sequence[float]) -> list[dict[str, float]]:
    """Return accuracy and cost of each exit alone: what a network gives that may be stopped at any time.

    Args:
        exit_logits: ``(exits, images, classes)``.
        labels: Class indices ``(images,)``.
        costs: Cost of an image that leaves at each exit.

    Returns:
        Rows with ``exit``, ``cost``, ``share`` of the full cost, and ``accuracy``.
    """
    return [
        {
            "exit": exit,
            "cost": cost,
            "share": cost / costs[-1],
            "accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
        }
        for exit, (logits, cost) in enumerate(zip(exit_logits, costs, strict=True))
    ]


def budgeted_curve(
    exit_logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    test_logits: Tensor,
    test_labels: Tensor,
    *,
    targets: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    criterion: str = "confidence",
) -> list[dict[str, float]]:
    """Return accuracy against mean cost as the budget varies (MSDNet, Huang et al. 2018, budgeted classification).

    Args:
        exit_logits: Logits that policies are calibrated on, ``(exits, images, classes)``.
        labels: Their labels.
        costs: Cost of an image that leaves at each exit.
        test_logits: Logits of other images, that policies are judged on.
        test_labels: Their labels.
        targets: Budgets as shares of the full cost; those below the cheapest exit's are left out.
        criterion: What policies decide by.

    Returns:
        Rows with ``target``, ``cost``, ``share`` of the full cost, and ``accuracy``.
    """
    policy, evidence = gather_evidence(exit_logits, labels, costs, criterion)
    rows = []
    for target in targets:
        if target >= evidence.costs.min():
            best = solve(policy, evidence, target_cost=target)
            _, found = gather_evidence(test_logits, test_labels, costs, policy=best)
            accuracy, share = found.measure(list(best.thresholds))
            rows.append({"target": target, "cost": share * costs[-1], "share": share, "accuracy": accuracy})
    return rows


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as a Markdown table, one column per key.

    Example:
        >>> print(to_table([{"exit": 0, "accuracy": 0.51239}]))
        | exit | accuracy |
        | --- | --- |
        | 0 | 0.5124 |
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(row.get(key, "")) for key in rows[0]] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).replace("|", "\\|").split("\n"))


def plot_curves(curves: dict[str, Sequence[dict[str, float]]], path: str) -> None:
    """Draw accuracy against the share of the full cost.

    Args:
        curves: Rows of :func:`anytime_curve` and :func:`budgeted_curve`, by the name in the legend.
        path: Where the picture goes; its ending decides the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        axes.plot([row["share"] for row in rows], [row["accuracy"] for row in rows], marker="o", label=name)
    axes.set_xlabel("mean cost, share of the full network")
    axes.set_ylabel("accuracy")
    axes.legend()
    figure.savefig(path)
