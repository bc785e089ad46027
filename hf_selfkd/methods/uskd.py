"""Universal Self-Knowledge Distillation: soft labels from the network's own confidence and ranking of the classes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional import (
    cross_entropy,
    masked_mean,
    non_target_log_softmax,
    shared_mean,
    smooth_labels,
    soft_cross_entropy,
    target_classes,
)
from ..models.outputs import MultiExitOutput
from .base import Method, check_range, missing_scaffold
from .weak_classifier import WeakClassifier, build_weak_classifier


@dataclass(frozen=True, kw_only=True)
class USKD(Method):
    """From Knowledge Distillation to Self-Knowledge Distillation (Yang et al., ICCV 2023).

    https://arxiv.org/abs/2303.13005. A weak classifier reads the stage before the last; its gradient reaches the
    backbone. Defaults are the authors' for ImageNet; for CIFAR-100 all three weights are 0.1.

    Args:
        target_weight: Weight of the loss of the label's class (the paper's alpha), at least 0.
        non_target_weight: Weight of the loss of all other classes (beta), at least 0.
        weak_weight: Weight of the weak classifier's label loss (mu), above 0. Its labels are smoothed by 0.1.
    """

    name: ClassVar[str] = "uskd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.13005"
    detach_exits: ClassVar[bool] = True

    target_weight: float = 1.0
    non_target_weight: float = 0.1
    weak_weight: float = 0.005

    def __post_init__(self):
        check_range(self, "target_weight", 0)
        check_range(self, "non_target_weight", 0)
        check_range(self, "weak_weight", 0, strict=True)

    def scaffold(self, model: nn.Module) -> WeakClassifier:
        """Build the weak classifier."""
        return build_weak_classifier(model)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``target``, ``non_target`` and ``weak``, each a mean over the labelled images."""
        if output.scaffold is None:
            raise missing_scaffold(self, "its weak classifier")
        logits, weak_logits = output.exit_logits[-1].float(), output.scaffold["weak_logits"].float()
        probabilities = smooth_labels(labels, logits.shape[1], 0.0)
        is_target, is_labelled = target_classes(probabilities), probabilities.sum(dim=1) > 0
        smoothed = smooth_labels(labels, logits.shape[1], 0.1)
        ranked = zipf_labels(logits, weak_logits, is_target)
        non_target = -(ranked * non_target_log_softmax(logits, is_target)).sum(dim=1)
        target = soft_cross_entropy(logits, target_labels(logits, probabilities, is_target))
        return {
            "label": cross_entropy(logits, labels),
            "target": self.target_weight * masked_mean(target, is_labelled),
            "non_target": self.non_target_weight * masked_mean(non_target, is_labelled),
            "weak": self.weak_weight * masked_mean(soft_cross_entropy(weak_logits, smoothed), is_labelled),
        }


@torch.no_grad()
def target_labels(logits: Tensor, labels: Tensor, is_target: Tensor) -> Tensor:
    """Soft labels of the target classes, 0 elsewhere: ``y + s^2 - mean(s^2)``, the mean over the batch.

    With mixed labels it is over both target classes, and no soft label is below 0, where the loss would have no bound.

    Args:
        logits: ``(batch, classes)``.
        labels: Probabilities ``(batch, classes)``.
        is_target: ``(batch, classes)``, see :func:`~hf_selfkd.functional.target_classes`.
    """
    squares = logits.softmax(dim=1).square()
    return ((labels + squares - shared_mean(squares, is_target)) * is_target).clamp(min=0)


@torch.no_grad()
def zipf_labels(logits: Tensor, weak_logits: Tensor, is_target: Tensor) -> Tensor:
    """Soft labels of the other classes by Zipf's law, 1 over their rank, which sum to 1; 0 for the target classes.

    All classes are ranked, as in the authors' code, by the sum of the two classifiers' ``p / (1 - p_t)``. For the
    final exit that code takes the logarithm of ``p`` and ``p_t`` instead, which is no such ratio; we do not.

    Args:
        logits: ``(batch, classes)``.
        weak_logits: ``(batch, classes)``.
        is_target: ``(batch, classes)``.
    """
    score = sum(non_target_log_softmax(each, is_target).exp() for each in (logits, weak_logits))
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    labels = rank.reciprocal().masked_fill(is_target, 0)
    return labels / labels.sum(dim=1, keepdim=True)
