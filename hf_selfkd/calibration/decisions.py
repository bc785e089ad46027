"""What calibration compares: classes of the softmax, or sets of labels of a multi-label model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.criteria import get_criterion
from ..models.labels import UNLABELLED, as_classes, class_labels, label_sets
from ..models.multi_label import is_exact_match, is_known

# For some images: logits (images, classes), targets, and the inverse temperature, to the first and second derivative
# of the label loss by the latter, both (images,).
Derivatives = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Predictions of a kind of model: how they follow from logits, and when they are correct.

    Args:
        predict: Logits ``(images, classes)`` to predictions, images first, which may be targets of other exits.
        is_correct: Predictions and targets to ``(images,)``, booleans.
        derivatives: Those of the label loss by the inverse temperature.
        convert_labels: ``(labels, num_classes)`` returns labels as targets, images first, or raises ValueError.
        is_labelled: Converted labels to ``(images,)``, whether there is one.
    """

    predict: Callable[[Tensor], Tensor]
    is_correct: Callable[[Tensor, Tensor], Tensor]
    derivatives: Derivatives
    convert_labels: Callable[[Any, int], Tensor]
    is_labelled: Callable[[Tensor], Tensor]


def decisions_of(criterion: str) -> Decisions:
    """Return the kind of predictions that a criterion scores.

    Raises:
        ValueError: If there is no criterion of this name.
    """
    return LABEL_SETS if get_criterion(criterion).multi_label else CLASSES


def labelled_images(labels: Any, exit_logits: Any, criterion: str) -> tuple[Tensor | None, Tensor]:
    """Return labels as targets, and the indices of the images that have one; of all images without labels.

    Args:
        labels: As for :func:`~hf_selfkd.calibrate`.
        exit_logits: ``(exits, images, classes)``.
        criterion: As for :func:`~hf_selfkd.calibrate`.

    Raises:
        ValueError: If the labels do not suit the logits or the criterion, or fewer than three images have one.
    """
    decisions = decisions_of(criterion)
    num_images, num_classes = exit_logits[0].shape
    rows = torch.arange(num_images)
    if labels is not None:
        labels = decisions.convert_labels(labels, num_classes)
        if len(labels) != num_images:
            raise ValueError(f"labels must hold one label per image, {num_images} in all, but got {len(labels)}.")
        rows = rows[decisions.is_labelled(labels).cpu()]
    if len(rows) < 3:
        raise ValueError(f"Calibration needs three images or more with a label, but got {len(rows)}.")
    return labels, rows


def _class_derivatives(logits: Tensor, targets: Tensor, inverse: float) -> tuple[Tensor, Tensor]:
    logits = logits - logits.amax(dim=1, keepdim=True)
    probabilities = (logits * inverse).softmax(dim=1)
    mean = (probabilities * logits).sum(dim=1)
    slope = mean - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return slope, (probabilities * logits * logits).sum(dim=1) - mean * mean


def _convert_classes(labels: Any, num_classes: int) -> Tensor:
    return as_classes(class_labels(labels, num_classes, "The calibration data"))


def _label_derivatives(logits: Tensor, targets: Tensor, inverse: float) -> tuple[Tensor, Tensor]:
    known = is_known(targets)
    probabilities = (logits * inverse).sigmoid()
    slope = (probabilities - targets) * logits
    curvature = probabilities * (1 - probabilities) * logits * logits
    count = known.sum(dim=1).clamp(min=1)
    return torch.where(known, slope, 0).sum(dim=1) / count, torch.where(known, curvature, 0).sum(dim=1) / count


def _convert_label_sets(labels: Any, num_classes: int) -> Tensor:
    labels = label_sets(labels, num_classes, "The calibration data")
    return torch.where(is_known(labels), (labels > 0.5).float(), UNLABELLED).long()


CLASSES = Decisions(
    predict=lambda logits: logits.argmax(dim=1),
    is_correct=lambda predictions, targets: predictions == targets,
    derivatives=_class_derivatives,
    convert_labels=_convert_classes,
    is_labelled=lambda labels: labels != UNLABELLED,
)
LABEL_SETS = Decisions(
    predict=lambda logits: logits > 0,
    is_correct=is_exact_match,
    derivatives=_label_derivatives,
    convert_labels=_convert_label_sets,
    is_labelled=lambda labels: is_known(labels).any(dim=1),
)
