"""Evaluations of a trainer, for its model card."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Evaluation(NamedTuple):
    """An evaluation of a trainer.

    Args:
        step: The training step.
        num_images: The number of images.
        metrics: The metrics.
        confusion: Confusion matrices of every exit and the ensemble, ``(exits + 1, classes, classes)``, if requested.
    """

    step: int
    num_images: int
    metrics: dict[str, float]
    confusion: np.ndarray | None = None


def name_of_set(prefix: str) -> str | None:
    """Return the name of an evaluated dataset, ``None`` for the only one, by the prefix of its metrics.

    Example:
        >>> name_of_set("eval_noisy"), name_of_set("test"), name_of_set("eval")
        ('noisy', 'test', None)
    """
    return None if prefix == "eval" else prefix.removeprefix("eval_")


def evaluation_facts(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return ``metrics``, ``num_eval_images`` and ``results`` for :class:`~hf_selfkd.model_card.CardFacts`.

    Args:
        evaluations: Evaluations by the prefix of their metrics.
    """
    found: dict[str, Any] = {"results": []}
    for prefix, evaluation in evaluations.items():
        start = len(prefix) + 1
        own = {name[start:]: value for name, value in evaluation.metrics.items() if name.startswith(f"{prefix}_")}
        metrics, num_images = {f"eval_{name}": value for name, value in own.items()}, evaluation.num_images
        if (name := name_of_set(prefix)) is None:
            found |= {"num_eval_images": num_images, "metrics": metrics}
        else:
            found["results"].append({"name": name, "num_images": num_images, "metrics": metrics})
    return found
