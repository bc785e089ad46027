"""Criteria of exit policies: scores by which images exit early."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .did_you_mean import did_you_mean
from .multi_label import mean_confidence, min_confidence


def _confidence(probabilities: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the largest probability (Guo et al. 2017; MSDNet, Huang et al. 2018, section 4)."""
    return probabilities.amax(dim=-1), None


def _entropy(probabilities: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return one minus the entropy over log(classes) (BranchyNet, Teerapittayanon et al. 2016)."""
    entropy = torch.special.entr(probabilities).sum(dim=-1) / math.log(max(2, probabilities.shape[-1]))
    return (1 - entropy).clamp(0, 1), None


def _margin(probabilities: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the largest probability minus the second largest."""
    largest = probabilities.topk(min(2, probabilities.shape[-1]), dim=-1).values
    return largest[:, 0] - largest[:, 1:].sum(dim=-1), None


def _patience(probabilities: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return how many exits before this one in a row predicted the same class (PABEE, Zhou et al. 2020).

    The history holds predictions and streaks, ``(2, batch)``.
    """
    predictions = probabilities.argmax(dim=-1)
    streak = torch.zeros_like(predictions)
    if history is not None:
        streak = torch.where(predictions == history[0], history[1] + 1, streak)
    return streak.float(), torch.stack([predictions, streak])


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A score by which images exit early; it grows with certainty and is at least 0.

    Args:
        name: Its name in ``ExitPolicy.criterion`` and in saved policies.
        description: A noun phrase for the model card.
        score: ``(probabilities, history) -> (scores, history)``: the softmax of an exit ``(batch, classes)`` and the
            history of the previous exit, ``None`` at the first; scores ``(batch,)`` in float32 and the history for the
            next exit, images along its last dimension, ``None`` if the criterion needs none.
        max_score: The largest possible score at an exit.
        uses_temperature: Whether the score depends on the temperature that the logits are divided by.
        uses_history: Whether the score at an exit depends on the predictions of earlier exits.
        multi_label: Whether the probabilities are sigmoid outputs, of a multi-label model, instead of the softmax.
    """

    name: str
    description: str
    score: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    max_score: Callable[[int], float] = lambda exit: 1.0
    uses_temperature: bool = True
    uses_history: bool = False
    multi_label: bool = False

    def never(self, num_exits: int) -> float:
        """Return a threshold that no score reaches at any of ``num_exits`` exits."""
        return max(map(self.max_score, range(num_exits))) + 1


# All criteria by name: policies, calibration and model card read everything about a criterion from its record.
CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion(name="confidence", description="the largest softmax probability", score=_confidence),
        Criterion(
            name="entropy",
            description="one minus the entropy of the softmax, as a share of the largest possible entropy",
            score=_entropy,
        ),
        Criterion(
            name="margin",
            description="the difference between the two largest softmax probabilities",
            score=_margin,
        ),
        Criterion(
            name="patience",
            description="the number of consecutive earlier exits with the same prediction",
            score=_patience,
            max_score=float,
            uses_temperature=False,
            uses_history=True,
        ),
        Criterion(
            name="min_confidence",
            description="the smallest of max(p, 1 - p) over all classes, with p the sigmoid of the logit",
            score=min_confidence,
            multi_label=True,
        ),
        Criterion(
            name="mean_confidence",
            description="the mean of max(p, 1 - p) over all classes, with p the sigmoid of the logit",
            score=mean_confidence,
            multi_label=True,
        ),
    )
}


def get_criterion(name: str) -> Criterion:
    """Look up a criterion by name.

    Raises:
        ValueError: If there is no criterion of this name.
    """
    if not isinstance(name, str) or name not in CRITERIA:
        hint = did_you_mean(str(name), CRITERIA)
        raise ValueError(f"Unknown criterion {name!r}.{hint} Available: {', '.join(CRITERIA)}.")
    return CRITERIA[name]
