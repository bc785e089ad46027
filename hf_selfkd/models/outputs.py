"""Outputs of multi-exit models: the contract between models and methods."""

from collections import OrderedDict
from collections.abc import ItemsView
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .loss import cross_entropy
from .multi_label import binary_cross_entropy


@dataclass
class MultiExitOutput(ModelOutput):
    """Outputs of all exits. All tuples run over exits or stages, first to last.

    Args:
        loss: Cross-entropy of ``logits``, a scalar; only if labels were given.
        logits: ``(batch, classes)`` of the final exit (in eval mode the mean over exits, if ``config.ensemble``);
            for segmentation ``(batch, classes, height, width)``.
        exit_logits: One tensor like ``logits`` per exit, the final exit included.
        exit_features: Pooled vectors that enter each exit's classifier, each ``(batch, exit_width)``; for
            classification only.
        exit_maps: Feature maps of all stages, for segmentation of all levels of the pyramid, each ``(batch, channels,
            height, width)``; in training unless ``model.returns_maps`` is false, or with
            ``output_hidden_states=True``.
        stage_outputs: Raw outputs of the stages, in the backbone's own layout and with prefix tokens, of which
            ``exit_maps`` are views; given together with these, for classification only.
        scaffold: Outputs of ``model.scaffold``, the modules used only in training.
        sample_indices: Indices of the images in the training data, ``(batch,)``; set by the training loop, for methods
            that keep something for each image.

    Attributes:
        label_loss: The loss of logits, of one exit or a sequence of exits, by labels:
            :func:`~hf_selfkd.models.loss.cross_entropy`, or of a multi-label model
            :func:`~hf_selfkd.models.multi_label.binary_cross_entropy`.
        is_multi_label: Whether each logit is a binary decision of its own.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    exit_features: tuple[Tensor, ...] | None = None
    exit_maps: tuple[Tensor, ...] | None = None
    stage_outputs: tuple | None = None
    scaffold: dict | None = None
    sample_indices: Tensor | None = None

    # Without annotations, because a dataclass would take them for outputs.
    label_loss = staticmethod(cross_entropy)
    is_multi_label = False

    # transformers' pipelines split a batch by the items of its output. They index a tuple by the image, and a nested
    # output tensor by tensor, which is right for exits. All else, pytrees included, sees the tuples.
    def items(self) -> ItemsView[str, Any]:
        """Return the items, each tuple as a nested ``ModelOutput``, which the constructor turns into a tuple again."""
        values = zip(self.keys(), self.values(), strict=True)
        return {name: _nested(value) if isinstance(value, tuple) else value for name, value in values}.items()

    def __getitem__(self, key: str | int | slice) -> Any:
        return OrderedDict.__getitem__(self, key) if isinstance(key, str) else super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value.to_tuple() if isinstance(value, ModelOutput) else value)

    @property
    def is_dense(self) -> bool:
        """Whether the logits are per pixel, ``(batch, classes, height, width)``."""
        return self.exit_logits[-1].dim() == 4

    @property
    def ensemble_logits(self) -> Tensor:
        """Mean of all exits' logits, ``(batch, classes)``: the ensemble of BYOT (section 4) and EED (equation 1)."""
        return torch.stack(self.exit_logits).mean(dim=0)


def _nested(values: tuple) -> ModelOutput:
    return ModelOutput({str(index): value for index, value in enumerate(values)})


def as_tuples(values: Any) -> Any:
    """Turn nested outputs in a tuple of values of :meth:`MultiExitOutput.items` into tuples again."""
    if not isinstance(values, tuple):
        return values
    return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in values)


@dataclass
class MultiLabelOutput(MultiExitOutput):
    """Outputs of all exits of a multi-label model; ``loss`` is the binary cross-entropy of ``logits``."""

    label_loss = staticmethod(binary_cross_entropy)
    is_multi_label = True


@dataclass
class EarlyExitOutput(ModelOutput):
    """Outputs of the exit that each image took.

    Args:
        logits: ``(batch, classes)``, rows in the order of the input.
        exit_index: ``(batch,)``, the exit of each image, from 0, first to last.
        confidence: ``(batch,)`` in [0, 1], the largest softmax probability at that exit, after its temperature; of a
            multi-label model the score by which it exits.
    """

    logits: Tensor | None = None
    exit_index: Tensor | None = None
    confidence: Tensor | None = None
