"""Cross-entropy, accuracy and calibration of every exit and of their ensemble."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Bins of the calibration error, as in Guo et al.
NUM_BINS = 15


def reduce_class_logits(exit_logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce logits to what the metrics need per image, so that memory does not grow with the number of classes.

    Args:
        exit_logits: ``(batch, classes)`` of every exit.
        labels: Class indices ``(batch,)``, -100 where there is no label, or probabilities ``(batch, classes)``.

    Returns:
        Predictions ``(batch, exits + 1, 3)`` in float32, per exit and of the ensemble: cross-entropy, whether the
        prediction is correct, and its confidence, the largest softmax probability. Whether each image is labelled
        ``(batch,)``.
    """
    exit_logits = [torch.as_tensor(logits).float() for logits in exit_logits]
    labels = torch.as_tensor(labels, device=exit_logits[0].device)
    is_soft = labels.ndim == 2
    classes = labels.argmax(dim=1) if is_soft else labels
    columns = []
    for logits in [*exit_logits, torch.stack(exit_logits).mean(dim=0)]:
        loss = F.cross_entropy(logits, labels, reduction="none")
        confidence, predictions = logits.softmax(dim=1).max(dim=1)
        columns.append(torch.stack([loss, (predictions == classes).float(), confidence], dim=-1))
    return torch.stack(columns, dim=1), labels.sum(dim=1) > 0 if is_soft else labels != -100


def compute_class_metrics(predictions: np.ndarray, is_labelled: np.ndarray) -> dict[str, float]:
    """Compute the metrics of every exit and of the ensemble, over labelled images.

    Args:
        predictions: ``(images, exits + 1, 3)``, as :func:`reduce_class_logits` returns them.
        is_labelled: ``(images,)``, likewise.

    Returns:
        ``loss``, ``accuracy`` and ``calibration_error`` of the final exit, of every exit (``exit_0_accuracy``) and,
        ``loss`` aside, of the ensemble; all are 0 where no image is labelled.
    """
    predictions = np.asarray(predictions)[np.asarray(is_labelled)].astype(np.float64)
    means = predictions.mean(axis=0) if len(predictions) else np.zeros(predictions.shape[1:])
    errors = [calibration_error(column[:, 1], column[:, 2]) for column in predictions.swapaxes(0, 1)]
    *exits, ensemble = zip(means[:, 0].tolist(), means[:, 1].tolist(), errors, strict=True)
    metrics = dict(zip(("loss", "accuracy", "calibration_error"), exits[-1], strict=True))
    for index, (loss, accuracy, error) in enumerate(exits):
        metrics |= {f"exit_{index}_loss": loss, f"exit_{index}_accuracy": accuracy}
        metrics |= {f"exit_{index}_calibration_error": error}
    return metrics | {"ensemble_accuracy": ensemble[1], "ensemble_calibration_error": ensemble[2]}


def calibration_error(is_correct: np.ndarray, confidence: np.ndarray) -> float:
    """Compute the expected calibration error over equal bins (Guo et al., ICML 2017, equation 3).

    https://arxiv.org/abs/1706.04599

    Args:
        is_correct: Whether each prediction is correct, 0 or 1, ``(images,)``.
        confidence: Its probability according to the model, in (0, 1], ``(images,)``.

    Returns:
        The mean distance between accuracy and confidence, in [0, 1]; 0 where there is no image.

    Example:
        >>> calibration_error(np.array([1, 0, 1, 1]), np.array([0.75, 0.75, 0.5, 0.5]))
        0.375
    """
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    distances = np.bincount(bins, weights=is_correct - confidence, minlength=NUM_BINS)
    return float(np.abs(distances).sum() / max(len(is_correct), 1))
