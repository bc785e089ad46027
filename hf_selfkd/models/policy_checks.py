"""Checks of the numbers in exit policies."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_numbers(name: str, values: Any, wanted: str, is_valid: Callable[[float], bool]) -> tuple[float, ...]:
    """Return the numbers of a policy as floats.

    Args:
        name: Of the field, for the error.
        values: What was given for it.
        wanted: The range of each number, in words.
        is_valid: Whether a finite number is in this range.

    Raises:
        ValueError: If they are no list of finite numbers in the range.
    """
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and is_valid(value)
        for value in values
    ):
        raise ValueError(f"{name} must be a list of numbers {wanted}, but got {values!r}.")
    return tuple(float(value) for value in values)


def check_thresholds(thresholds: Tensor, num_images: int, num_thresholds: int) -> Tensor:
    """Return thresholds of each image in float32.

    Raises:
        ValueError: If they are not shaped ``(num_images, num_thresholds)``, or one is negative or NaN.
    """
    thresholds = torch.as_tensor(thresholds, dtype=torch.float32)
    expected = (num_images, num_thresholds)
    if thresholds.shape != expected:
        raise ValueError(
            f"thresholds must be shaped (images, auxiliary exits), {expected}, but got {tuple(thresholds.shape)}."
        )
    if not (thresholds >= 0).all():
        raise ValueError(f"thresholds must be at least 0, but the least is {thresholds.min().item():.4g}.")
    return thresholds
