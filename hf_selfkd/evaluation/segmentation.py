"""Cross-entropy, mean IoU and pixel accuracy of every exit, from counts that add up over images and processes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..models.loss import cross_entropy, resize_logits


def reduce_pixel_logits(exit_logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce logits to what the metrics need per image, so that no label or feature map is kept.

    Args:
        exit_logits: As for :func:`reduce_to_pixel_counts`.
        labels: Likewise.

    Returns:
        The results of :func:`reduce_to_pixel_counts` and :func:`reduce_to_pixel_losses`.
    """
    labels = torch.as_tensor(labels)
    return reduce_to_pixel_counts(exit_logits, labels), reduce_to_pixel_losses(exit_logits, labels)


def reduce_to_pixel_counts(exit_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Count per image the diagonal of the confusion matrix and both its margins.

    Args:
        exit_logits: ``(batch, classes, height, width)`` of every exit, interpolated to the size of the labels.
        labels: Class indices ``(batch, height, width)``, -100 where there is no label.

    Returns:
        ``(batch, exits + 1, 3, classes)``, per exit and of the ensemble: for each class the labelled pixels that are
        correctly predicted as it, that are predicted as it, and that have its label.
    """
    exit_logits = [torch.as_tensor(logits).float() for logits in exit_logits]
    labels = labels.to(exit_logits[0].device)
    classes = exit_logits[0].shape[1]
    is_labelled = labels != -100
    labelled = _count(labels, is_labelled, classes)
    counts = []
    for logits in [*exit_logits, torch.stack(exit_logits).mean(dim=0)]:
        predictions = resize_logits(logits, labels.shape[-2:]).argmax(dim=1)
        correct = _count(predictions, is_labelled & (predictions == labels), classes)
        counts.append(torch.stack([correct, _count(predictions, is_labelled, classes), labelled], dim=1))
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
    # An additional bin takes the ignored pixels.
    bins = torch.where(mask, classes_of_pixels, classes).flatten(1)
    counts = torch.zeros(len(bins), classes + 1, dtype=torch.long, device=bins.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins))[:, :classes]


def compute_pixel_metrics(counts: np.ndarray) -> dict[str, float]:
    """Compute IoU and accuracy from counts that are added up over all images first.

    Args:
        counts: ``(images, exits + 1, 3, classes)``, as :func:`reduce_to_pixel_counts` returns them.

    Returns:
        ``mean_iou`` and ``pixel_accuracy`` of the final exit, of every exit and of the ensemble. The mean is over
        classes that occur in labels or predictions; both are 0 where no pixel is labelled.
    """
    correct, predicted, labelled = np.asarray(counts).astype(np.int64).sum(axis=0).swapaxes(0, 1)
    union = predicted + labelled - correct
    iou = correct / np.maximum(union, 1)
    mean_iou = iou.sum(axis=1) / np.maximum((union > 0).sum(axis=1), 1)
    accuracy = correct.sum(axis=1) / np.maximum(labelled.sum(axis=1), 1)
    names = [*(f"exit_{index}" for index in range(len(mean_iou) - 1)), "ensemble"]
    metrics = {"mean_iou": float(mean_iou[-2]), "pixel_accuracy": float(accuracy[-2])}
    for name, exit_iou, exit_accuracy in zip(names, mean_iou.tolist(), accuracy.tolist(), strict=True):
        metrics |= {f"{name}_mean_iou": exit_iou, f"{name}_pixel_accuracy": exit_accuracy}
    return metrics


def compute_segmentation_metrics(counts: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Compute the metrics of every exit and of the ensemble.

    Args:
        counts: As for :func:`compute_pixel_metrics`.
        losses: ``(images, exits)``, as :func:`reduce_to_pixel_losses` returns them.

    Returns:
        The metrics of :func:`compute_pixel_metrics`, and ``loss`` of the final exit and of every exit
        (``exit_0_loss``), means over images.
    """
    means = np.asarray(losses).astype(np.float64).mean(axis=0).tolist()
    exits = {f"exit_{index}_loss": mean for index, mean in enumerate(means)}
    return compute_pixel_metrics(counts) | {"loss": means[-1]} | exits
