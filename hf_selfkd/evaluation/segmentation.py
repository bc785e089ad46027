"""Mean IoU and pixel accuracy of every exit, from counts that add up over images, batches and processes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..models.loss import cross_entropy, resize_logits


def reduce_to_pixel_counts(exit_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Count per image what the metrics need of the confusion matrix: its diagonal and both its margins.

    Args:
        exit_logits: Of every exit ``(batch, classes, height, width)``, interpolated to the size of the labels.
        labels: Class indices ``(batch, height, width)``, -100 where there is no label.

    Returns:
        ``(batch, exits + 1, 3, classes)``, per exit and of the ensemble: labelled pixels of each class that are
        answered rightly, that are answered so, and that are labelled so.
    """
    exit_logits = [torch.as_tensor(logits).float() for logits in exit_logits]
    labels = labels.to(exit_logits[0].device)
    classes = exit_logits[0].shape[1]
    known = labels != -100
    labelled = _count(labels, known, classes)
    counts = []
    for logits in [*exit_logits, torch.stack(exit_logits).mean(dim=0)]:
        answers = resize_logits(logits, labels.shape[-2:]).argmax(dim=1)
        right = _count(answers, known & (answers == labels), classes)
        counts.append(torch.stack([right, _count(answers, known, classes), labelled], dim=1))
    return torch.stack(counts, dim=1)


def reduce_to_pixel_losses(exit_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Compute the cross-entropy of every exit for each image, a mean over its labelled pixels; 0 where none is.

    Args:
        exit_logits: As for :func:`reduce_to_pixel_counts`.
        labels: Likewise.

    Returns:
        ``(batch, exits)``.
    """
    return torch.stack(
        [
            torch.stack([cross_entropy(image[None], label[None]) for image, label in zip(logits, labels, strict=True)])
            for logits in map(torch.as_tensor, exit_logits)
        ],
        dim=1,
    )


def _count(classes_of_pixels: Tensor, mask: Tensor, classes: int) -> Tensor:
    # One bin more takes the pixels that do not count.
    bins = torch.where(mask, classes_of_pixels, classes).flatten(1)
    counts = torch.zeros(len(bins), classes + 1, dtype=torch.long, device=bins.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins))[:, :classes]


def compute_pixel_metrics(counts: np.ndarray) -> dict[str, float]:
    """Add the counts of all images up, then divide once.

    Args:
        counts: What :func:`reduce_to_pixel_counts` returned, for all images.

    Returns:
        ``mean_iou`` and ``pixel_accuracy`` of the deepest exit, of every exit and of the ensemble. The mean is over
        classes that occur in labels or answers; both are 0 where nothing is labelled.
    """
    right, answered, labelled = counts.astype(np.int64).sum(axis=0).swapaxes(0, 1)
    union = answered + labelled - right
    iou = right / np.maximum(union, 1)
    mean_iou = iou.sum(axis=1) / np.maximum((union > 0).sum(axis=1), 1)
    accuracy = right.sum(axis=1) / np.maximum(labelled.sum(axis=1), 1)
    names = [*(f"exit_{index}" for index in range(len(mean_iou) - 1)), "ensemble"]
    metrics = {"mean_iou": float(mean_iou[-2]), "pixel_accuracy": float(accuracy[-2])}
    for name, exit_iou, exit_accuracy in zip(names, mean_iou.tolist(), accuracy.tolist(), strict=True):
        metrics |= {f"mean_iou_{name}": exit_iou, f"pixel_accuracy_{name}": exit_accuracy}
    return metrics
