"""A multi-exit network cut at its exits, as graph modules that run one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from ..models.timm_quirks import copy_module


class CannotCut(ValueError):
    """Behind an exit the network cannot continue with part of the batch."""


class AllExits(nn.Module):
    """The logits of all exits, first to final, as a plain tuple of ``(batch, classes)``.

    Args:
        model: A multi-exit model for classification, in eval mode.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Map images ``(batch, channels, height, width)`` to the logits of all exits."""
        # Hidden states imply all exits.
        return self.model(pixel_values, output_hidden_states=True, return_dict=True).exit_logits


@dataclass(frozen=True)
class Segment:
    """The part of a network between one exit and the next.

    Args:
        module: Maps the tensors that cross the cut before it to the logits ``(batch, classes)`` of its exit and then
            the tensors that cross the cut behind it. The first segment takes ``pixel_values``; nothing crosses behind
            the last.
        examples: Inputs for a batch of two.
        rows: For each input its rows per image along the first axis, 0 if that axis is not the batch.
    """

    module: fx.GraphModule
    examples: tuple[Tensor, ...]
    rows: tuple[int, ...]


@torch.no_grad()
def cut_at_exits(model: PreTrainedModel, image_size: tuple[int, int]) -> list[Segment]:
    """Cut a model at its exits.

    The graph of all exits is exported once with a dynamic batch. Every node goes to the first exit that needs it. What
    does not depend on the images, such as a position embedding or the size of the batch, is computed anew in each
    segment that uses it.

    Args:
        model: A multi-exit model for classification; it is copied to the CPU in float32, not changed.
        image_size: Height and width of the images in pixels.

    Returns:
        One segment per exit, first to final.
    """
    model = copy_module(model).to("cpu", torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.config.pretrained_cfg["input_size"][0], *image_size, generator=generator)
    program = torch.export.export(
        AllExits(model), (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
    )
    return _Cutter(program.module(check_guards=False)).segments(images)


@torch.no_grad()
def check_shrinks(segments: Sequence[Segment]) -> None:
    """Check that a network can continue with fewer images at every cut, by running it on one of its two examples.

    Networks that :meth:`~MultiExitForImageClassification.early_exit` cannot continue with fewer images, because timm's
    code holds the size of the batch or a skip connection across a stage, may still do so: a cut has all that crosses.

    Raises:
        CannotCut: If something crosses a cut that does not have one row per image, or an image affects another.
    """
    for exit, segment in enumerate(segments[1:]):
        for example, rows in zip(segment.examples, segment.rows, strict=True):
            if rows != 1:
                raise CannotCut(
                    f"Behind exit {exit} the network reads a tensor of shape {tuple(example.shape)} for two images, "
                    "which does not have one row per image, so it cannot continue with fewer images."
                )
        both, alone = segment.module(*segment.examples), segment.module(*(tensor[1:] for tensor in segment.examples))
        for complete, part in zip(both, alone, strict=True):
            error = (complete[1:] - part).abs().max().item()
            if not error <= 1e-4 * complete.abs().max().item():
                raise CannotCut(
                    f"Behind exit {exit} the network gives an image another result, by {error:.1g}, if the other "
                    "image of a batch is left out, so it cannot continue with fewer images."
                )


class _Cutter:
    """Cuts the graph of all exits.

    Args:
        module: Maps images to a tuple with the logits of every exit.
    """

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.nodes = list(module.graph.nodes)
        [self.images] = [node for node in self.nodes if node.op == "placeholder"]
        [self.results] = [node.args[0] for node in self.nodes if node.op == "output"]
        self.batch = self.images.meta["val"].shape[0]
        self.varying = self._reachable()
        self.exit_of = self._assign()

    def _reachable(self) -> set[fx.Node]:
        """Return the nodes that hold something computed from the images, not just from the size of their batch."""
        varying = {self.images}
        for node in self.nodes:
            if varying.intersection(node.all_input_nodes) and not _is_size(node):
                varying.add(node)
        return varying

    def _assign(self) -> dict[fx.Node, int]:
        """Return the first exit that needs each of the nodes that vary."""
        exit_of: dict[fx.Node, int] = {}
        for exit, result in enumerate(self.results):
            pending = [result]
            while pending:
                node = pending.pop()
                if node in self.varying and node not in exit_of:
                    exit_of[node] = exit
                    pending += node.all_input_nodes
        return exit_of

    def crossing(self, exit: int) -> list[fx.Node]:
        """Return the nodes that are computed up to an exit and used behind it."""
        behind = [node for node, first in self.exit_of.items() if first > exit]
        used = {source for node in behind for source in self._sources(node)}
        return [node for node in self.nodes if node in used and self.exit_of[node] <= exit]

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the varying nodes that a node reads, but for those of which it only needs the size of the batch."""
        sources, pending = [], list(node.all_input_nodes)
        while pending:
            source = pending.pop()
            if source in self.varying:
                sources.append(source)
            elif not self._is_batch_size(source):
                pending += source.all_input_nodes
        return sources

    def _is_batch_size(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.SymInt) and str(value) == str(self.batch)  # == would add a guard

    def segments(self, images: Tensor) -> list[Segment]:
        """Return all segments, with examples that begin with ``images``."""
        segments, inputs, examples = [], [self.images], (images,)
        for exit in range(len(self.results)):
            outputs = self.crossing(exit)
            module = self._build(exit, inputs, outputs)
            rows = tuple(map(self._rows, inputs, examples))
            segments.append(Segment(module, examples, rows))
            inputs, examples = outputs, tuple(module(*examples)[1:])
        return segments

    def _rows(self, node: fx.Node, example: Tensor) -> int:
        """Return the rows per image along the first axis of a tensor, 0 if that axis is not the batch."""
        shape = node.meta["val"].shape
        return len(example) // 2 if len(shape) and isinstance(shape[0], torch.SymInt) else 0

    def _build(self, exit: int, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
        """Return the graph from the inputs to the logits of an exit and the outputs."""
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        first = copies[inputs[0]]

        def copy(node: fx.Node) -> fx.Node:
            if node not in copies:
                if self._is_batch_size(node):
                    copies[node] = graph.call_function(torch.ops.aten.sym_size.int, (first, 0))
                else:
                    copies[node] = graph.node_copy(node, copy)
            return copies[node]

        for node in self.nodes:  # in order, so that no recursion gets deep
            if self.exit_of.get(node) == exit:
                copy(node)
        graph.output(tuple(copy(node) for node in (self.results[exit], *outputs)))
        module = fx.GraphModule(self.module, graph, class_name=f"Segment{exit}")
        module.graph.lint()
        return module


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt, torch.SymBool, bool))
