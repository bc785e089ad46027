"""Hooks at the ends of the stages of a timm model.

A forward hook sits where each stage of ``feature_info`` ends. During a call of :func:`run` it passes the stage's
output to the visitor of that call, which may return a replacement (for early exit, fewer rows). Otherwise it does
nothing.
"""

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# torch has no public pytree; this one is its oldest and is used throughout the ecosystem (transformers, accelerate).
from torch.utils._pytree import tree_map, tree_map_only

from .stages import Anatomy
from .timm_quirks import classifiers

# The visitor of the call that is running in this thread. Not an attribute of the model: that would break pickle, and
# two threads that share a model would receive each other's images.
_active = threading.local()


class Visitor:
    """Receives the intermediate outputs of a backbone. Does nothing by itself; subclasses override what they need."""

    def on_stage(self, index: int, output: Any) -> Any:
        """Receive the raw output of a stage as it ends.

        Returns:
            The output that the network continues with; ``None`` keeps the stage's own.
        """

    def on_features(self, features: Tensor) -> None:
        """Receive the features ``(batch, width)`` that enter a classifier; called once per classifier."""


class Collector(Visitor):
    """Collects raw outputs by stage, and features by classifier."""

    def __init__(self):
        self.outputs: dict[int, Any] = {}
        self.features: list[Tensor] = []

    def on_stage(self, index: int, output: Any) -> None:
        """Collect the output."""
        self.outputs[index] = output

    def on_features(self, features: Tensor) -> None:
        """Collect the features."""
        self.features.append(features)


def _report_stage(index: int, module: nn.Module, args: Any, output: Any) -> Any:
    visitor = getattr(_active, "visitor", None)
    return None if visitor is None else visitor.on_stage(index, output)


def _report_features(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    visitor = getattr(_active, "visitor", None)
    if visitor is not None:
        # Attention pooling (resnet50_clip) classifies all tokens and then takes the first.
        visitor.on_features(args[0][:, 0] if args[0].dim() == 3 else args[0].flatten(1))


def attach_hooks(backbone: nn.Module, paths: list[str | None]) -> None:
    """Attach the hooks that report to the visitor of :func:`run`.

    Args:
        backbone: A timm model with a classifier.
        paths: Path of the module that ends each stage, first to last; ``None`` where there is no such module.
    """
    for index, path in enumerate(paths):
        if path is not None:
            attach_stage_hook(backbone.get_submodule(path), index)
    for classifier in classifiers(backbone):
        classifier.register_forward_pre_hook(_report_features)


def attach_stage_hook(module: nn.Module, index: int) -> None:
    """Attach the hook that reports a module's output as that of the stage ``index``."""
    module.register_forward_hook(partial(_report_stage, index))


def run(backbone: nn.Module, anatomy: Anatomy, pixel_values: Tensor, visitor: Visitor) -> Tensor:
    """Run a backbone and return its logits; the visitor receives each stage as it ends.

    Args:
        backbone: A model with the hooks of :func:`attach_hooks`.
        anatomy: Its measured structure.
        pixel_values: ``(batch, channels, height, width)``.
        visitor: Receives each stage and the features. The value it returns for a stage replaces the output, unless it
            is ``None`` or the anatomy is not ``hooked``.
    """
    previous = getattr(_active, "visitor", None)
    _active.visitor = visitor
    try:
        if anatomy.hooked:
            return backbone(pixel_values)
        final, feature_maps = backbone.forward_intermediates(pixel_values)
        for index, feature_map in enumerate(feature_maps):
            visitor.on_stage(index, feature_map)
        return backbone.forward_head(final)
    finally:
        _active.visitor = previous


def check_seen(backbone: nn.Module, anatomy: Anatomy, seen: Collector) -> None:
    """Check that all stages and the classifier were reported: modules that were replaced have lost their hooks.

    Raises:
        ValueError: If one was not.
    """
    silent = [stage.module for index, stage in enumerate(anatomy.stages) if index not in seen.outputs]
    if silent:
        raise ValueError(
            f"The module {silent[0]} of the backbone, which ends a stage, was replaced after the model was built, so "
            "its output is not seen. Change the backbone first and build the model with from_backbone(backbone)."
        )
    if not seen.features:
        raise ValueError(
            f"The classifier of the backbone was replaced by one for {backbone.num_classes} classes after the model "
            "was built. Build the model with num_labels, or load a checkpoint with num_labels=..., "
            "ignore_mismatched_sizes=True, so that all exits get these classes."
        )


def keep_rows(output: Any, rows: Tensor, batch_size: int) -> Any:
    """Keep the ``rows`` of every tensor in a stage's raw output.

    Args:
        output: A tensor, or lists and tuples of tensors and other values, which stay (mvitv2 returns a grid size).
        rows: Indices of images.
        batch_size: Images in the batch; a tensor may have several rows for each (tnt).
    """
    return tree_map_only(Tensor, lambda tensor: tensor.unflatten(0, (batch_size, -1))[rows].flatten(0, 1), output)


def join_rows(outputs: list[Any]) -> Any:
    """Concatenate the raw outputs of a stage for consecutive parts of a batch."""
    return tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *outputs)


def join_features(features: list[Tensor]) -> Tensor:
    """Join the features of several classifiers: their mean where the widths agree, else their concatenation."""
    if len(features) == 1:
        return features[0]
    if len({tensor.shape[-1] for tensor in features}) == 1:
        return torch.stack(features).mean(dim=0)
    return torch.cat(features, dim=-1)
