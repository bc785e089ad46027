"""Cross-entropy and accuracy of every exit and of their ensemble."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.trainer_utils import EvalPrediction

from .pixel_metrics import compute_pixel_metrics, reduce_to_pixel_counts


def reduce_to_exit_metrics(predictions: tuple, labels: Tensor) -> Tensor:
    """Reduce logits to what the metrics need, so that memory does not grow with images times classes.

    Args:
        predictions: Logits ``(batch, classes)`` and a tuple of the exits' logits, as the Trainer passes them.
        labels: Class indices ``(batch,)``, -100 where there is no label, or probabilities ``(batch, classes)``;
            or maps of them ``(batch, height, width)``.

    Returns:
        ``(batch, exits + 1, 2)``: cross-entropy and whether the answer is right, per exit and of the ensemble; for
        segmentation what :func:`reduce_to_pixel_counts` returns.
    """
    if labels.ndim == 3:
        return reduce_to_pixel_counts(predictions[1], torch.as_tensor(labels))
    exit_logits = [torch.as_tensor(logits).float() for logits in predictions[1]]
    labels = torch.as_tensor(labels, device=exit_logits[0].device)
    classes = labels.argmax(dim=1) if labels.ndim == 2 else labels
    columns = []
    for logits in [*exit_logits, torch.stack(exit_logits).mean(dim=0)]:
        loss = F.cross_entropy(logits, labels, reduction="none")
        columns.append(torch.stack([loss, (logits.argmax(dim=1) == classes).float()], dim=-1))
    return torch.stack(columns, dim=1)


def compute_exit_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute cross-entropy and accuracy of every exit, and the ensemble's accuracy, over labelled images.

    For segmentation: mean IoU and pixel accuracy.
    """
    reduced = prediction.predictions
    if isinstance(reduced, tuple):
        reduced = reduce_to_exit_metrics(reduced, prediction.label_ids).numpy()
    if prediction.label_ids.ndim == 3:
        return compute_pixel_metrics(reduced)
    labelled = prediction.label_ids != -100 if prediction.label_ids.ndim == 1 else prediction.label_ids.sum(axis=1) > 0
    means = reduced[labelled].astype(np.float64).mean(axis=0) if labelled.any() else np.zeros(reduced.shape[1:])
    *exits, ensemble = means.tolist()
    metrics = {"loss": exits[-1][0], "accuracy": exits[-1][1]}
    for index, (loss, accuracy) in enumerate(exits):
        metrics |= {f"loss_exit_{index}": loss, f"accuracy_exit_{index}": accuracy}
    return metrics | {"accuracy_ensemble": ensemble[1]}
