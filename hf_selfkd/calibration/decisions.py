"""What calibration compares: classes of the softmax, or sets of labels of a multi-label model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.exit_policy import CRITERIA, get_criterion
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
        check_labels: ``(labels, num_images, num_classes)`` raises ValueError unless the labels may be targets.
    """

    predict: Callable[[Tensor], Tensor]
    is_correct: Callable[[Tensor, Tensor], Tensor]
    derivatives: Derivatives
    check_labels: Callable[[Tensor, int, int], None]


def decisions_of(criterion: str) -> Decisions:
    """Return the kind of predictions that a criterion scores.

    Raises:
        ValueError: If there is no criterion of this name.
    """
    return LABEL_SETS if get_criterion(criterion).multi_label else CLASSES


def _class_derivatives(logits: Tensor, targets: Tensor, inverse: float) -> tuple[Tensor, Tensor]:
    logits = logits - logits.amax(dim=1, keepdim=True)
    probabilities = (logits * inverse).softmax(dim=1)
    mean = (probabilities * logits).sum(dim=1)
    slope = mean - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return slope, (probabilities * logits * logits).sum(dim=1) - mean * mean


def _check_classes(labels: Tensor, num_images: int, num_classes: int) -> None:
    wrong = labels.shape != (num_images,) or labels.is_floating_point()
    if wrong or not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"labels must be {num_images} class indices from 0 to {num_classes - 1}, but got {labels.dtype} labels "
            f"shaped {tuple(labels.shape)}. Multi-label models take labels shaped (images, classes), and the "
            f"criterion {_binary_criteria()}."
        )


def _label_derivatives(logits: Tensor, targets: Tensor, inverse: float) -> tuple[Tensor, Tensor]:
    known = is_known(targets)
    probabilities = (logits * inverse).sigmoid()
    slope = (probabilities - targets) * logits
    curvature = probabilities * (1 - probabilities) * logits * logits
    count = known.sum(dim=1).clamp(min=1)
    return torch.where(known, slope, 0).sum(dim=1) / count, torch.where(known, curvature, 0).sum(dim=1) / count


def _check_label_sets(labels: Tensor, num_images: int, num_classes: int) -> None:
    wrong = labels.shape != (num_images, num_classes)
    if wrong or not ((labels == 0) | (labels == 1) | ~is_known(labels)).all():
        raise ValueError(
            f"The criterion {_binary_criteria()} is for multi-label models, whose labels are shaped "
            f"{(num_images, num_classes)}, 0 or 1 and -100 where unknown, but got {labels.dtype} labels shaped "
            f"{tuple(labels.shape)}."
        )
    if not is_known(labels).any(dim=1).all():
        raise ValueError("Some images have no known label, so no prediction can be correct. Leave them out.")


def _binary_criteria() -> str:
    return " or ".join(name for name, record in CRITERIA.items() if record.multi_label)


CLASSES = Decisions(
    predict=lambda logits: logits.argmax(dim=1),
    is_correct=lambda predictions, targets: predictions == targets,
    derivatives=_class_derivatives,
    check_labels=_check_classes,
)
LABEL_SETS = Decisions(
    predict=lambda logits: logits > 0,
    is_correct=is_exact_match,
    derivatives=_label_derivatives,
    check_labels=_check_label_sets,
)
