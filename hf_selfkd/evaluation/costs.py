"""The cost of early exit: multiply-adds, parameters and milliseconds per exit, images per second."""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
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

    def __init__(self, model: PreTrainedModel, image_size: tuple[int, int], read: Callable[[], Any]):
        self.model = model
        self.policy = ExitPolicy(thresholds=[2.0] * (model.num_exits - 1))
        self.exit_at = {stage: exit for exit, stage in enumerate(model.exit_stages)}
        self.image_size = image_size
        self.read = read
        self.readings: list[Any] = []

    def on_stage(self, stage: int, output: Any) -> None:
        if stage in self.exit_at:
            exit = self.exit_at[stage]
            self.policy.score(exit, self.model.logits_at_exit(exit, output, self.image_size))
            self.readings.append(self.read())


@torch.no_grad()
def _read_at_exits(model: PreTrainedModel, images: Tensor, read: Callable[[], Any]) -> list[Any]:
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
    """Count the multiply-adds of one image up to each exit, including the heads of earlier exits.

    Counted by torch's own FLOP counter on the meta device, where it sees every operator, fused attention too.

    Args:
        model: A multi-exit model for classification.
        image_size: Side of the image, or height and width, in pixels; ``None`` for the one the model is meant for.

    Returns:
        One number per exit, first to final.
    """
    return exit_counts(model, image_size)[0]


def exit_parameters(model: PreTrainedModel) -> list[int]:
    """Count the parameters used up to each exit, including the heads of earlier exits.

    Args:
        model: A multi-exit model for classification.

    Returns:
        One number per exit, first to final; the last counts all inference weights.
    """
    return exit_counts(model)[1]


def exit_counts(
    model: PreTrainedModel, image_size: int | tuple[int, int] | None = None
) -> tuple[list[int], list[int]]:
    """Return :func:`exit_costs` and :func:`exit_parameters`, both counted in one pass on the meta device."""
    twin, images = _meta_twin(model, image_size)
    met: dict[nn.Parameter, None] = {}
    for module in twin.modules():
        module.register_forward_pre_hook(lambda module, _: met.update(dict.fromkeys(module.parameters(recurse=False))))
    with FlopCounterMode(display=False) as counter:
        readings = _read_at_exits(twin, images, lambda: (counter.get_total_flops(), _count(met)))
    operations, parameters = zip(*readings, strict=True)
    # torch counts a multiply-add as two operations.
    return [round(count / 2) for count in operations], [*parameters[:-1], _count(twin.parameters())]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _meta_twin(model: PreTrainedModel, image_size: int | tuple[int, int] | None) -> tuple[PreTrainedModel, Tensor]:
    """Build the model and an image on the meta device, where running it takes neither memory nor time."""
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
    """Measure the latency of a batch up to each exit in milliseconds, on the device of the model.

    It is cumulative, with the heads and scores of earlier exits. With these as ``costs``, the ``target_cost`` for a
    budget in milliseconds is the budget over the last of them.

    Args:
        model: A multi-exit model for classification, in eval mode.
        image_size: Side of the image, or height and width, in pixels; ``None`` for the model's own.
        batch_size: Images in the batch that is timed.
        repeats: Number of runs to take the median of, after a tenth as many for warm-up.

    Returns:
        One number per exit, first to last.
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
    """Measure the speed-up of early exit on a batch, and compare it with the one counted from costs.

    Args:
        model: A multi-exit model for classification, in eval mode.
        pixel_values: Real images ``(batch, channels, height, width)``: random inputs exit elsewhere.
        policy: The exit policy.
        costs: Cost of an image that exits at each exit, such as :func:`exit_costs`.
        repeats: Number of runs of each kind, in turn, to compare the medians of.

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
