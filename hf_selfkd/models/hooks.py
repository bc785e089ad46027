"""Hooks that listen where the stages of a timm model end.

A forward hook sits where each stage of ``feature_info`` ends. During a call of :func:`run` it hands what the stage
gives to that call's visitor, which may answer with a replacement (early exit: with fewer rows); else it does nothing.
"""

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .stages import Anatomy
from .timm_quirks import classifiers

# The visitor of the call that is running in this thread. Not on the model: that would break pickle and let two
# threads on one model see each other's images.
_active = threading.local()


class Visitor:
    """Sees a backbone while it runs. Does nothing by itself: subclasses override what they want to see."""

    def on_stage(self, index: int, output: Any) -> Any:
        """See the raw output of a stage as it ends.

        Returns:
            What the network continues with in its place; ``None`` leaves it alone.
        """

    def on_features(self, features: Tensor) -> None:
        """See what enters a classifier, ``(batch, width)``; called once per classifier."""


class Collector(Visitor):
    """Keeps what it sees: raw outputs by stage, and features by classifier."""

    def __init__(self):
        self.outputs: dict[int, Any] = {}
        self.features: list[Tensor] = []

    def on_stage(self, index: int, output: Any) -> None:
        """Keep the output."""
        self.outputs[index] = output

    def on_features(self, features: Tensor) -> None:
        """Keep the features."""
        self.features.append(features)


def _report(index: int, module: nn.Module, args: Any, output: Any) -> Any:
    visitor = getattr(_active, "visitor", None)
    return None if visitor is None else visitor.on_stage(index, output)


def _report_features(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    visitor = getattr(_active, "visitor", None)
    if visitor is not None:
        # Attention pooling (resnet50_clip) classifies all tokens and then takes the first.
        visitor.on_features(args[0][:, 0] if args[0].dim() == 3 else args[0].flatten(1))


def attach_hooks(backbone: nn.Module, anatomy: Anatomy) -> None:
    """Let the visitor of :func:`run` see every stage and what enters the classifier."""
    _listen(backbone, [stage.module for stage in anatomy.stages])


def _listen(backbone: nn.Module, paths: list[str | None]) -> None:
    for index, path in enumerate(paths):
        if path is not None:
            backbone.get_submodule(path).register_forward_hook(partial(_report, index))
    for classifier in classifiers(backbone):
        classifier.register_forward_pre_hook(_report_features)


def run(backbone: nn.Module, anatomy: Anatomy, pixel_values: Tensor, visitor: Visitor) -> Tensor:
    """Run the backbone and return its logits; the visitor sees each stage as it ends.

    Args:
        backbone: A model that :func:`attach_hooks` was called on.
        anatomy: What :func:`measure` found.
        pixel_values: ``(batch, channels, height, width)``.
        visitor: Sees each stage and the features. What it returns for a stage replaces the output, unless that is
            ``None`` or the anatomy is not ``hooked``.
    """
    previous = getattr(_active, "visitor", None)
    _active.visitor = visitor
    try:
        if anatomy.hooked:
            return backbone(pixel_values)
        final, maps = backbone.forward_intermediates(pixel_values)
        for index, stage_map in enumerate(maps):
            visitor.on_stage(index, stage_map)
        return backbone.forward_head(final)
    finally:
        _active.visitor = previous


def keep_rows(output: Any, rows: Tensor, batch_size: int) -> Any:
    """Keep the ``rows`` of every tensor in a stage's raw output; one may hold several rows per image (tnt)."""
    if isinstance(output, (list, tuple)):
        return type(output)(keep_rows(item, rows, batch_size) for item in output)
    if not isinstance(output, Tensor):
        return output  # the size of the map (mvitv2)
    return output.unflatten(0, (batch_size, -1))[rows].flatten(0, 1)


def join_rows(outputs: list[Any]) -> Any:
    """Join what a stage gave for parts of a batch."""
    first = outputs[0]
    if isinstance(first, (list, tuple)):
        return type(first)(join_rows(list(items)) for items in zip(*outputs, strict=True))
    return torch.cat(outputs) if isinstance(first, Tensor) else first


def join_features(features: list[Tensor]) -> Tensor:
    """Join what enters several classifiers: the mean where the widths agree, else side by side."""
    if len(features) == 1:
        return features[0]
    if len({tensor.shape[-1] for tensor in features}) == 1:
        return torch.stack(features).mean(dim=0)
    return torch.cat(features, dim=-1)
