"""The temperature of an exit, by passes over its logits in chunks."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .decisions import Derivatives

# Images whose logits are in float32 at once: few enough to stay in a processor's cache.
CHUNK = 512

# Temperatures lie in [1 / TEMPERATURE_LIMIT, TEMPERATURE_LIMIT]: logits that separate the classes perfectly have no
# best one.
TEMPERATURE_LIMIT = 100.0


def chunks(logits: Any, rows: Tensor) -> Iterator[Tensor]:
    """Yield float32 logits of some images, a few at a time, so that memory-mapped arrays are never copied in full."""
    for part in rows.split(CHUNK):
        chunk = logits[part.to(logits.device)] if isinstance(logits, Tensor) else torch.as_tensor(logits[part.numpy()])
        yield chunk.detach().float().cpu()


def fit_temperature(logits: Any, labels: Tensor, rows: Tensor, derivatives: Derivatives) -> float:
    """Return the temperature of least label loss, by Newton's method on its inverse, in which the loss is convex.

    Starting from the optimum for the first images, two or three passes over all of them are enough.
    """
    inverse = 1.0
    for count in (4 * CHUNK, len(rows)):
        low, high = 1 / TEMPERATURE_LIMIT, TEMPERATURE_LIMIT
        for _ in range(30):
            slope, curvature = _slope(logits, labels[:count], rows[:count], inverse, derivatives)
            low, high = (low, inverse) if slope > 0 else (inverse, high)
            step = inverse - slope / curvature if curvature > 0 else low
            step = step if low < step < high else math.sqrt(low * high)
            change, inverse = abs(step / inverse - 1), step
            if change < 1e-4:
                break
    return 1 / inverse


def _slope(logits: Any, labels: Tensor, rows: Tensor, inverse: float, derivatives: Derivatives) -> tuple[float, float]:
    """Return the first and second derivative of the mean label loss by the inverse temperature."""
    slope = curvature = 0.0
    for chunk, targets in zip(chunks(logits, rows), labels.split(CHUNK), strict=True):
        first, second = derivatives(chunk, targets, inverse)
        slope += first.sum(dtype=torch.float64).item()
        curvature += second.sum(dtype=torch.float64).item()
    return slope / len(rows), curvature / len(rows)
