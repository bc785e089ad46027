"""What early exit costs: multiply-adds, parameters and milliseconds per exit, images per second."""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..models.exit_policy import ExitPolicy
from ..models.hooks import Visitor, run


class _Meter(Visitor):
    """Computes and scores every exit, without letting images exit, and reads a meter after each."""

    def __init__(self, model: PreTrainedModel, image_size: tuple[int, int], read: Callable[[], float]):
        self.model = model
        self.policy = ExitPolicy(thresholds=[2.0] * (model.num_exits - 1))
        self.exit_at = {stage: exit for exit, stage in enumerate(model.exit_stages)}
        self.image_size = image_size
        self.read = read
        self.readings: list[float] = []

    def on_stage(self, stage: int, output: Any) -> None:
        if stage in self.exit_at:
            exit = self.exit_at[stage]
            self.policy.score(exit, self.model.logits_at_exit(exit, output, self.image_size))
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
        height, width = to_2tuple(image_size)
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
