"""Cross-entropy, accuracy and calibration of every exit and of their ensemble."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.trainer_utils import EvalPrediction

from .segmentation import compute_pixel_metrics, reduce_to_pixel_counts, reduce_to_pixel_losses

# Bins of the calibration error, as Guo et al. have them.
NUM_BINS = 15


def reduce_to_answers(exit_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Reduce logits to what the metrics need of an answer, whatever the number of classes.

    Args:
        exit_logits: Of every exit ``(batch, classes)``.
        labels: Class indices ``(batch,)``, -100 where there is no label, or probabilities ``(batch, classes)``.

    Returns:
        ``(batch, exits + 1, 3)`` in float32, per exit and of the ensemble: cross-entropy, whether the answer is right,
        and its confidence, the largest softmax probability.
    """
    exit_logits = [torch.as_tensor(logits).float() for logits in exit_logits]
    labels = torch.as_tensor(labels, device=exit_logits[0].device)
    classes = labels.argmax(dim=1) if labels.ndim == 2 else labels
    columns = []
    for logits in [*exit_logits, torch.stack(exit_logits).mean(dim=0)]:
        loss = F.cross_entropy(logits, labels, reduction="none")
        confidence, answers = logits.softmax(dim=1).max(dim=1)
        columns.append(torch.stack([loss, (answers == classes).float(), confidence], dim=-1))
    return torch.stack(columns, dim=1)


def summarise_answers(answers: np.ndarray) -> dict[str, float]:
    """Compute the metrics of every exit and of the ensemble.

    Args:
        answers: What :func:`reduce_to_answers` returned, for all labelled images.

    Returns:
        ``loss``, ``accuracy`` and ``calibration_error`` of the deepest exit, of every exit (``accuracy_exit_0``) and,
        but for ``loss``, of the ensemble; all are 0 where there is no image.
    """
    answers = answers.astype(np.float64)
    means = answers.mean(axis=0) if len(answers) else np.zeros(answers.shape[1:])
    errors = [calibration_error(exit_answers[:, 1], exit_answers[:, 2]) for exit_answers in answers.swapaxes(0, 1)]
    *exits, ensemble = zip(means[:, 0].tolist(), means[:, 1].tolist(), errors, strict=True)
    metrics = dict(zip(("loss", "accuracy", "calibration_error"), exits[-1], strict=True))
    for index, (loss, accuracy, error) in enumerate(exits):
        metrics |= {f"loss_exit_{index}": loss, f"accuracy_exit_{index}": accuracy}
        metrics |= {f"calibration_error_exit_{index}": error}
    return metrics | {"accuracy_ensemble": ensemble[1], "calibration_error_ensemble": ensemble[2]}


def calibration_error(right: np.ndarray, confidence: np.ndarray) -> float:
    """Compute the expected calibration error over equal bins (Guo et al., ICML 2017, equation 3).

    https://arxiv.org/abs/1706.04599

    Args:
        right: Whether each answer is right, 0 or 1, ``(images,)``.
        confidence: Its probability by the model, in (0, 1], ``(images,)``.

    Returns:
        The mean distance between accuracy and confidence, in [0, 1]; 0 where there is no image.

    Example:
        >>> calibration_error(np.array([1, 0, 1, 1]), np.array([0.75, 0.75, 0.5, 0.5]))
        0.375
    """
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    distances = np.bincount(bins, weights=right - confidence, minlength=NUM_BINS)
    return float(np.abs(distances).sum() / max(len(right), 1))


def reduce_to_exit_metrics(predictions: tuple, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Reduce what the Trainer passes to what the metrics need, so that memory does not grow with images times classes.

    Args:
        predictions: Logits ``(batch, classes)`` and a tuple of the exits' logits.
        labels: As for :func:`reduce_to_answers`; or maps of class indices ``(batch, height, width)``.

    Returns:
        What :func:`reduce_to_answers` returns; for segmentation :func:`reduce_to_pixel_counts` and
        :func:`reduce_to_pixel_losses`.
    """
    if labels.ndim == 3:
        labels = torch.as_tensor(labels)
        return reduce_to_pixel_counts(predictions[1], labels), reduce_to_pixel_losses(predictions[1], labels)
    return reduce_to_answers(predictions[1], labels)


def compute_exit_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute what :func:`summarise_answers` returns, over labelled images.

    For segmentation: mean IoU, pixel accuracy and the mean over images of cross-entropy.
    """
    reduced = prediction.predictions
    if isinstance(reduced, tuple) and isinstance(reduced[1], tuple):  # all logits
        reduced = reduce_to_exit_metrics(reduced, prediction.label_ids)
    if prediction.label_ids.ndim == 3:
        counts, losses = map(np.asarray, reduced)
        *_, loss = means = losses.astype(np.float64).mean(axis=0).tolist()
        return (
            compute_pixel_metrics(counts) | {"loss": loss} | {f"loss_exit_{i}": mean for i, mean in enumerate(means)}
        )
    reduced = np.asarray(reduced)
    labelled = prediction.label_ids != -100 if prediction.label_ids.ndim == 1 else prediction.label_ids.sum(axis=1) > 0
    return summarise_answers(reduced[labelled])
