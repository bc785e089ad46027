"""Labels, checked and converted to what losses and metrics take: in one place for training, evaluation, calibration.

A label of any integer type becomes int64, probabilities become float32, and -100 marks what has no label.
"""

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNLABELLED = -100
# Of the sum of probabilities: rounding in bfloat16 stays below it.
_TOLERANCE = 1e-2
_SEVERAL_CLASSES = (
    'For images with several classes build the model with problem_type="multi_label_classification", and calibrate it '
    'with criterion="min_confidence".'
)


def class_labels(labels: Any, num_labels: int, name: str, *, check_values: bool = True) -> Tensor:
    """Check and convert the labels of images with one class each.

    Args:
        labels: A tensor, an array or a list: class indices ``(images,)`` of any integer type, -100 where there is no
            label; or probabilities ``(images, classes)`` that are at least 0 and sum to 1, or are all 0 where there
            is no label.
        num_labels: Number of classes.
        name: Begins the text of errors, such as ``Sample 7 of the training data``.
        check_values: Whether to read the values too, for which a tensor on an accelerator has to be waited for.

    Returns:
        ``(images,)`` in int64, or ``(images, classes)`` in float32.

    Raises:
        ValueError: If the labels are of another kind, or of classes that do not exist.
    """
    found = _as_tensor(labels)
    is_soft = found is not None and found.is_floating_point()
    if found is None or found.dim() != (2 if is_soft else 1) or (is_soft and found.shape[1] != num_labels):
        raise ValueError(
            f"{name} has the label {_shown(labels)}, but a label is a class index (an integer) or {num_labels} "
            f"probabilities (floats). Use {UNLABELLED} where there is none. {_SEVERAL_CLASSES}"
        )
    found = found.float() if is_soft else found.long()
    if check_values:
        (_check_probabilities if is_soft else _check_indices)(found, num_labels, name)
    return found


def _check_indices(labels: Tensor, num_labels: int, name: str) -> None:
    # In Python: for the label of one sample calls of torch would take three times as long.
    wrong = [label for label in labels.tolist() if not 0 <= label < num_labels and label != UNLABELLED]
    if wrong:
        raise ValueError(
            f"{name} has label {wrong[0]}, but the model has {num_labels} classes (0 to {num_labels - 1}). "
            f"Build the model with num_labels of the data; where there is no label, use {UNLABELLED} instead."
        )


def _check_probabilities(labels: Tensor, num_labels: int, name: str) -> None:
    sums = labels.sum(dim=1)
    wrong = labels[~((labels >= 0).all(dim=1) & ((sums == 0) | ((sums - 1).abs() <= _TOLERANCE)))]
    if len(wrong):
        raise ValueError(
            f"{name} has the label {_shown(wrong[:1])}, but probabilities are at least 0 and sum to 1, or are all 0 "
            f"where there is no label. {_SEVERAL_CLASSES}"
        )


def as_classes(labels: Tensor) -> Tensor:
    """Return the class of each image ``(images,)``, of probabilities the largest; -100 where there is no label.

    Args:
        labels: As :func:`class_labels` returns them.
    """
    if not labels.is_floating_point():
        return labels
    return labels.argmax(dim=1).where(labels.sum(dim=1) > 0, UNLABELLED)


def label_sets(labels: Any, num_labels: int, name: str, *, check_values: bool = True) -> Tensor:
    """Check and convert the labels of images with any number of classes each.

    Args:
        labels: A tensor, an array or a list ``(images, classes)``: 0 or 1 of any type, or probabilities; -100 or NaN
            where unknown.
        num_labels: Number of classes.
        name: As for :func:`class_labels`.
        check_values: As for :func:`class_labels`.

    Returns:
        ``(images, classes)`` in float32. Unknown labels are NaN, so that mixing one with another image's label gives
        an unknown one, and a loss that does not know of them is not finite.

    Raises:
        ValueError: If the labels are of another kind, or neither probabilities nor unknown.
    """
    found = _as_tensor(labels)
    if found is None or found.dim() != 2 or found.shape[1] != num_labels:
        raise ValueError(
            f"{name} has the label {_shown(labels)}, but problem_type is multi_label_classification, where a label is "
            f"a vector of {num_labels} values, one for every class: 1 where the image has it, 0 where not and "
            f"{UNLABELLED} where unknown."
        )
    found = found.float()
    found = found.masked_fill(found == UNLABELLED, torch.nan)
    wrong = found[(found < 0) | (found > 1)] if check_values else ()
    if len(wrong):
        raise ValueError(
            f"{name} has {wrong[0].item():g} in its label, but in a multi-label one a class has 1 or 0, a probability "
            f"between, or {UNLABELLED} where unknown."
        )
    return found


def label_maps(
    labels: Any,
    image_size: Sequence[int] | None,
    num_labels: int,
    ignore_index: int,
    name: str,
    *,
    check_values: bool = True,
) -> Tensor:
    """Check and convert the labels of images for segmentation.

    Args:
        labels: A tensor, an array or a list: class indices ``(images, height, width)`` or ``(images, 1, height,
            width)``, ``ignore_index`` or -100 where a pixel has no label.
        image_size: Height and width of the images; ``None`` if they are not known.
        num_labels: Number of classes.
        ignore_index: ``config.semantic_loss_ignore_index``.
        name: As for :func:`class_labels`.
        check_values: As for :func:`class_labels`.

    Returns:
        ``(images, height, width)`` in int64, -100 where a pixel has no label.

    Raises:
        ValueError: If the labels are no maps, have another size than the images, or hold a class that does not exist.
    """
    found = _as_tensor(labels)
    if found is not None and found.dim() == 4 and found.shape[1] == 1:
        found = found.squeeze(1)
    if found is None or found.dim() != 3:
        raise ValueError(
            f"{name} has the label {_shown(labels)}, but a label is a map of class indices, an array of (height, "
            f"width) or (1, height, width). Mark pixels without a class with {ignore_index}."
        )
    if image_size is not None and found.shape[1:] != tuple(image_size):
        raise ValueError(
            f"{name} has a label map of {tuple(found.shape[1:])} pixels, but an image of {tuple(image_size)}. "
            "Transform both together."
        )
    maps = found.long()
    maps = maps.masked_fill(maps == ignore_index, UNLABELLED)
    if check_values:
        is_wrong = ((maps < 0) | (maps >= num_labels)) & (maps != UNLABELLED)
        if found.is_floating_point():
            is_wrong |= found.trunc() != found
        wrong = found[is_wrong]
        if len(wrong):
            raise ValueError(
                f"{name} has a pixel of class {wrong[0].item()}, but the model has {num_labels} classes (0 to "
                f"{num_labels - 1}) and ignores {ignore_index}. Build the model with num_labels and "
                "semantic_loss_ignore_index of the data."
            )
    return maps


def _as_tensor(labels: Any) -> Tensor | None:
    """Return labels as a tensor, ``None`` if they are none: that of one sample may be a tensor or array in a list."""
    try:
        if not isinstance(labels, list) or len(labels) != 1:
            return torch.as_tensor(labels)
        label = labels[0]
        # torch refuses some integers of numpy.
        return torch.as_tensor(label.item() if getattr(label, "ndim", None) == 0 else label).unsqueeze(0)
    except (TypeError, ValueError, RuntimeError):  # of strings, dictionaries, rows of several lengths
        return None


def _shown(labels: Any) -> str:
    found = _as_tensor(labels)
    if found is not None and found.dim() > 2:
        return f"of shape {tuple(found.shape[1:])}"
    labels = labels if found is None else found.tolist()
    return reprlib.repr(labels[0] if isinstance(labels, list) and len(labels) == 1 else labels)
