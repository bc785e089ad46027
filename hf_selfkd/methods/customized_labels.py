"""The customized soft labels of USKD (Yang et al., ICCV 2023), for the target class and for the others."""

import torch
from torch import Tensor

from ..functional import non_target_log_softmax, shared_mean


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
