"""Binary cross-entropy, mean average precision, F1 and exact matches of every exit and of their ensemble."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..models.multi_label import image_losses, is_exact_match, is_known


def reduce_binary_logits(exit_logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Stack what the metrics need per image: average precision ranks all images, so that nothing can be added up.

    Args:
        exit_logits: ``(batch, classes)`` of every exit.
        labels: ``(batch, classes)``, as :func:`~hf_selfkd.functional.binary_cross_entropy` takes them.

    Returns:
        Logits ``(batch, exits, classes)`` and labels ``(batch, classes)``, both in float32.
    """
    logits = torch.stack([torch.as_tensor(logits).float() for logits in exit_logits], dim=1)
    return logits, torch.as_tensor(labels, device=logits.device).float()


def compute_binary_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute the metrics of every exit and of the ensemble, the mean of all logits, over known labels.

    Args:
        logits: ``(images, exits, classes)``.
        labels: ``(images, classes)``; a probability above 0.5 counts as 1.

    Returns:
        ``loss``, ``mean_average_precision``, ``f1`` and ``accuracy`` of the final exit, of every exit
        (``exit_0_f1``) and, ``loss`` aside, of the ensemble; all are 0 where no label is known. The mean average
        precision is over the classes that any image has. A class is predicted where its logit is above 0. ``f1`` is
        the micro average, over all labels of all images. ``accuracy`` is the share of images all of whose labels are
        predicted: scikit-learn's ``accuracy_score`` of multi-label predictions.
    """
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    some_known = is_known(labels).any(dim=1)
    logits, labels = logits[some_known], labels[some_known]
    *exits, ensemble = [_metrics(part, labels) for part in (*logits.unbind(dim=1), logits.mean(dim=1))]
    named = {f"exit_{exit}": metrics for exit, metrics in enumerate(exits)}
    named["ensemble"] = {name: value for name, value in ensemble.items() if name != "loss"}
    return exits[-1] | {f"{exit}_{name}": value for exit, metrics in named.items() for name, value in metrics.items()}


def _metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    num_images = max(1, len(labels))
    hard = torch.where(is_known(labels), (labels > 0.5).float(), labels)
    predictions = logits > 0
    return {
        "loss": image_losses(logits, labels).double().sum().item() / num_images,
        "mean_average_precision": mean_average_precision(logits.numpy(), hard.numpy()),
        "f1": _micro_f1(predictions, hard),
        "accuracy": is_exact_match(predictions, hard).double().sum().item() / num_images,
    }


def _micro_f1(predictions: Tensor, labels: Tensor) -> float:
    predicted, present = (predictions & is_known(labels)).sum().item(), (labels == 1).sum().item()
    return 2 * (predictions & (labels == 1)).sum().item() / max(1, predicted + present)


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mean of :func:`average_precision` over the classes that any image has, 0 if there are none.

    Args:
        scores: Larger where a class is more likely, ``(images, classes)``.
        labels: 0 or 1, ``(images, classes)``; -100 or NaN where unknown, which is left out.
    """
    present = labels == 1
    known = present | (labels == 0)
    columns = [index for index in range(labels.shape[1]) if present[:, index].any()]
    found = [average_precision(scores[known[:, index], index], present[known[:, index], index]) for index in columns]
    return float(np.mean(found)) if found else 0.0


def average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Compute the mean precision over recall levels, without interpolation, as scikit-learn's function of this name.

    Args:
        scores: ``(images,)``; images with equal scores share a threshold.
        is_positive: Whether each image has the class, ``(images,)``; some have.

    Example:
        >>> average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]))  # (1 / 1 + 2 / 3) / 2
        0.8333333333333333
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(is_positive[order])
    is_last = np.append(np.diff(scores[order]) != 0, True)
    hits, ranks = hits[is_last], np.flatnonzero(is_last) + 1
    return float(np.sum(np.diff(hits, prepend=0) * hits / ranks) / hits[-1])
