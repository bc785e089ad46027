"""Multi-label classification: every class is a binary decision of its own, by the sigmoid of its logit.

The functions run in float32, also under autocast.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss import add, as_sequence, count_selected, replaced_loss

# The task of these models. Their pipeline is that of image classification.
MULTI_LABEL = "multi-label-classification"


def is_known(labels: Tensor) -> Tensor:
    """Return where there is a label, of the shape of ``labels``: where it is neither -100 nor NaN."""
    return (labels != -100) & (labels == labels)


def binary_cross_entropy(logits: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """Binary cross-entropy, a mean over the known labels of an image, then over the images that have any.

    Or the loss of :func:`~hf_selfkd.models.loss.label_loss`, as for ``cross_entropy``.

    If all labels are known, it is ``BCEWithLogitsLoss``, which transformers takes for multi-label classification.

    Args:
        logits: ``(batch, classes)``; or a sequence of such tensors, whose losses are summed.
        labels: ``(batch, classes)``, 0 or 1 of any type, or probabilities; -100 or NaN where unknown.

    Returns:
        A scalar; 0 if no label is known.

    Raises:
        ValueError: If ``labels`` have another shape.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> binary_cross_entropy(logits, torch.tensor([[1, -100], [-100, -100]]))  # log 2
        tensor(0.6931)
    """
    replaced = replaced_loss(logits, labels)
    if replaced is not None:
        return replaced
    known = is_known(labels)
    loss = add(image_losses(each, labels) for each in as_sequence(logits))
    return loss.sum() / count_selected(known.any(dim=1))


def image_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of each image, ``(batch,)``, 0 where no label is known.

    Arguments as for :func:`binary_cross_entropy`, with one tensor of logits.
    """
    if labels.shape != logits.shape:
        raise ValueError(
            f"Multi-label classification needs labels shaped {tuple(logits.shape)}, 0 or 1 for every class and -100 "
            f"where unknown, but got {labels.dtype} labels shaped {tuple(labels.shape)}."
        )
    known = is_known(labels)
    targets = torch.where(known, labels.float(), 0.0)
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return (losses * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)


def is_exact_match(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return for each image whether all its known labels are predicted, ``(images,)``.

    Args:
        predictions: ``(images, classes)``, true for the classes whose logit is above 0.
        labels: ``(images, classes)``, 0 or 1; -100 or NaN where unknown.
    """
    return ((predictions == (labels == 1)) | ~is_known(labels)).all(dim=1)


def min_confidence(probabilities: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the smallest ``max(p, 1 - p)`` of all classes: no decision is less certain."""
    return torch.maximum(probabilities, 1 - probabilities).amin(dim=-1), None


def mean_confidence(probabilities: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the mean of ``max(p, 1 - p)`` over classes: the share of decisions that the model expects to be right."""
    return torch.maximum(probabilities, 1 - probabilities).mean(dim=-1), None
