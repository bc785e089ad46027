"""Refuse labels that a model cannot learn from, with the index of the sample."""

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class LabelCheck(NamedTuple):
    """The labels that a model accepts.

    Args:
        num_labels: Class indices must be below it.
        name: Name of the data in errors, such as ``training``.
        ignore_index: Marks ignored pixels of label maps, beside -100.
    """

    num_labels: int
    name: str
    ignore_index: int = 255

    def __call__(self, index: int, sample: dict[str, Any]) -> None:
        """Check the label of a sample, if it has one: the trainer reports which columns a batch needs.

        Raises:
            ValueError: If the label is no class, or its label map has another size than its image.
        """
        name = next((name for name in ("labels", "label") if name in sample), None)  # the stock collator takes either
        if name is None:
            return
        label = sample[name]
        if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0:
            label = label.item()
        if isinstance(label, (int, np.integer)):
            self._check_class(index, label)
        elif getattr(label, "ndim", 0) == 2:
            self._check_map(index, torch.as_tensor(label), sample["pixel_values"].shape[-2:])
        elif not _are_probabilities(label, self.num_labels):
            raise ValueError(
                f"{self._sample(index)} has the label {reprlib.repr(label)}, but a label is a class index, a map of "
                f"them, or {self.num_labels} probabilities. Use -100 where there is none."
            )

    def _check_class(self, index: int, label: int) -> None:
        if label != -100 and not 0 <= label < self.num_labels:
            raise ValueError(
                f"{self._sample(index)} has label {label}, but the model has {self.num_labels} classes (0 to "
                f"{self.num_labels - 1}). Build the model with num_labels of the data."
            )

    def _check_map(self, index: int, label: Tensor, image_size: Sequence[int]) -> None:
        if label.shape != image_size:
            raise ValueError(
                f"{self._sample(index)} has a label map of {tuple(label.shape)} pixels, but an image of "
                f"{tuple(image_size)}. Transform both together."
            )
        wrong = set(label.unique().tolist()) - {*range(self.num_labels), -100, self.ignore_index}
        if wrong:
            raise ValueError(
                f"{self._sample(index)} has a pixel of class {min(wrong)}, but the model has {self.num_labels} "
                f"classes (0 to {self.num_labels - 1}) and ignores {self.ignore_index}. Build the model with "
                "num_labels and semantic_loss_ignore_index of the data."
            )

    def _sample(self, index: int) -> str:
        return f"Sample {index} of the {self.name} data"


def _are_probabilities(label: Any, num_labels: int) -> bool:
    if not isinstance(label, (list, tuple, Tensor, np.ndarray)) or len(label) != num_labels:
        return False
    return all(isinstance(value, float) for value in (label if isinstance(label, (list, tuple)) else label.tolist()))
