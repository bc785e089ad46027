"""Trainable copies of all layers after a stage: branches on one trunk.

A copy is the backbone itself with placeholders for everything that runs before the stage, so that no family needs code
of its own: the hook at the stage puts the trunk's output in. One traced run decides what is replaced. For a ResNet cut
at the end of ``layer3``:

    conv1  bn1  act1  maxpool  layer1  layer2  layer3 | layer4  global_pool  fc
    <------------------------------- ran ------------------------------------->     modules that were called
                                                        <------- after ------->     of these, after the stage ended
                                                        layer4.*        fc.*        parameters reached from its output
    <---------- replaced by placeholders -----------> | <-------- kept ------->
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only  # see hooks.py

from .hooks import Collector, attach_hooks, attach_stage_hook, join_features, run
from .stages import Anatomy
from .timm_quirks import classifiers, copy_module

# Errors raised by networks that read more of a placeholder than its output.
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class _Replacement(Collector):
    """Replaces the output of a stage.

    Args:
        stage: Index of the stage.
        output: The output that the network continues with.
    """

    def __init__(self, stage: int, output: Any):
        super().__init__()
        self.stage = stage
        self.output = output

    def on_stage(self, index: int, output: Any) -> Any:
        # A clone, because some networks continue with an in-place activation, and several tails read this output.
        return tree_map_only(Tensor, Tensor.clone, self.output) if index == self.stage else None


class Tail(nn.Module):
    """All layers of a backbone after a stage; made by :func:`copy_tail`.

    Its state has the names of the backbone's, so that it can be loaded there.

    Args:
        backbone: The backbone, with placeholders for everything that runs before the stage.
        anatomy: Its measured structure.
        stage: Index of the stage.
        image_shape: Channels, height and width of an image that the backbone takes.
    """

    def __init__(self, backbone: nn.Module, anatomy: Anatomy, stage: int, image_shape: tuple[int, int, int]):
        super().__init__()
        self.backbone = backbone
        self.anatomy = anatomy
        self.stage = stage
        self.image_shape = image_shape

    def forward(self, stage_output: Any) -> tuple[Tensor, Tensor]:
        """Map the stage's raw output to logits ``(batch, classes)`` and features ``(batch, width)``."""
        visitor = _Replacement(self.stage, stage_output)
        first = _tensors(stage_output)[0]
        images = first.new_zeros(()).expand(first.shape[0], *self.image_shape)
        logits = run(self.backbone, self.anatomy, images, visitor)
        return logits, join_features(visitor.features)

    @property
    def classifiers(self) -> list[nn.Module]:
        """The modules that map features to logits: one linear module, or several whose logits are averaged."""
        return classifiers(self.backbone)


class _Placeholder(nn.Module):
    """Returns zeros with the shapes of the output of the module it replaces; their values do not matter.

    Args:
        module: Its plain attributes are kept, because networks read some of them, such as the grid of their patches.
        rows: Length of the first dimension of its input: the batch, or more where windows are folded into it.
        output: Its output.
    """

    def __init__(self, module: nn.Module, rows: int, output: Any):
        super().__init__()
        plain = (bool, int, float, str, tuple, type(None))
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, plain):
                setattr(self, name, value)
        self._output = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), output)
        self._rows = rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        like = _tensors(args)[0]
        return tree_map_only(Tensor, lambda empty: self._zeros(empty.shape, like), self._output)

    def _zeros(self, shape: torch.Size, like: Tensor) -> Tensor:
        return like.new_zeros(()).expand(shape[0] * like.shape[0] // self._rows, *shape[1:])


def copy_tail(
    backbone: nn.Module,
    anatomy: Anatomy,
    stage: int,
    create: Callable[[], nn.Module],
    image_shape: tuple[int, int, int],
) -> Tail:
    """Copy all layers after a stage, newly initialised.

    With the backbone's own weights the copy must return its logits and features bit by bit on random inputs; then it
    gets those of a new backbone. It has parameters for what it computes and no others.

    Args:
        backbone: A model with the hooks of :func:`~hf_selfkd.models.hooks.attach_hooks`.
        anatomy: Its measured structure.
        stage: Index of the stage.
        create: Builds a new backbone.
        image_shape: Channels, height and width of an image that the backbone takes.

    Raises:
        ValueError: If there is no such stage, or the network is not sequential there: later layers read more than
            this one output.
    """
    if not 0 <= stage < len(anatomy.stages):
        raise ValueError(
            f"The backbone has stages 0 to {len(anatomy.stages) - 1}, but copy_tail was asked for {stage}."
        )
    refused = (
        f"The layers after stage {stage} of this {type(backbone).__name__} cannot be copied: the network is not "
        "sequential there. Choose another stage or another backbone."
    )
    if not anatomy.hooked:
        raise ValueError(refused)
    fresh = create()
    if fresh.state_dict().keys() != backbone.state_dict().keys():  # adapters (PEFT), which a branch does not need
        attach_hooks(fresh, [end.module for end in anatomy.stages])
        backbone = fresh.to(next(backbone.parameters()))
    tail = Tail(_trainable_copy(backbone), anatomy, stage, image_shape)
    try:
        same = _cut(tail)
    except _FAILURES as error:
        raise ValueError(refused) from error
    if not same:
        raise ValueError(refused)
    state = fresh.state_dict()
    tail.backbone.load_state_dict({name: state[name] for name in tail.backbone.state_dict()})
    return tail.train()


def _trainable_copy(backbone: nn.Module) -> nn.Module:
    copied = copy_module(backbone).requires_grad_(True)
    copied.train().eval()  # some networks cache tensors computed from their weights until they are trained again
    copied.set_grad_checkpointing(False)
    return copied


@torch.no_grad()
def _cut(tail: Tail) -> bool:
    """Remove from a tail all that runs before its stage; return whether its outputs stay the same bit by bit."""
    images = torch.randn(5, *tail.image_shape, generator=torch.Generator().manual_seed(0))
    images = images.to(next(tail.parameters()))
    trace = trace_run(tail, images[:3])
    seen = Collector()
    logits = run(tail.backbone, tail.anatomy, images[3:], seen)
    put_placeholders(tail, trace, modules_to_replace(tail.backbone, trace))
    drop_parameters(tail.backbone, trace)
    found = tail(seen.outputs[tail.stage])
    return all(torch.equal(*pair) for pair in zip(found, (logits, join_features(seen.features)), strict=True))


@dataclass(frozen=True)
class Trace:
    """One run of a complete backbone, see the drawing at the top.

    Args:
        end: Path of the module that ends the stage.
        ran: Paths of the modules that were called.
        after: Paths of those that were still called after the stage had ended.
        reached: Names of the parameters that logits or features depend on, given the stage's output.
        placeholders: A placeholder for every module that got a tensor, by path.
    """

    end: str
    ran: set[str]
    after: set[str]
    reached: set[str]
    placeholders: dict[str, _Placeholder]


def trace_run(tail: Tail, images: Tensor) -> Trace:
    """Run the complete backbone of a tail once and record it."""
    calls: list[str] = []
    placeholders: dict[str, _Placeholder] = {}

    def record(path: str, module: nn.Module, args: Any, output: Any) -> None:
        calls.append(path)
        if tensors := _tensors(args):
            placeholders[path] = _Placeholder(module, len(tensors[0]), output)

    modules = list(tail.backbone.named_modules())
    handles = [module.register_forward_hook(partial(record, path)) for path, module in modules]
    try:
        reached = _reached_parameters(tail, images)
    finally:
        for handle in handles:
            handle.remove()
    end = tail.anatomy.stages[tail.stage].module
    after = calls[calls.index(end) + 1 :]
    return Trace(end, set(calls), set(after), reached, placeholders)


class _Leaf(Collector):
    """Makes a stage's output the leaf that gradients are taken with respect to.

    Args:
        stage: Index of the stage.
    """

    def __init__(self, stage: int):
        super().__init__()
        self.stage = stage
        self.output: Any = None

    def on_stage(self, index: int, output: Any) -> Any:
        if index != self.stage:
            return None
        self.output = tree_map_only(Tensor, lambda tensor: tensor.detach().clone().requires_grad_(), output)
        return tree_map_only(Tensor, Tensor.clone, self.output)


@torch.enable_grad()
def _reached_parameters(tail: Tail, images: Tensor) -> set[str]:
    visitor = _Leaf(tail.stage)
    logits = run(tail.backbone, tail.anatomy, images, visitor)
    leaves = _tensors(visitor.output)
    total = logits.float().sum() + join_features(visitor.features).float().sum()
    names, parameters = zip(*tail.backbone.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, [*leaves, *parameters], allow_unused=True)
    if all(gradient is None for gradient in gradients[: len(leaves)]):
        raise ValueError("Nothing after the stage reads its output.")
    return {name for name, grad in zip(names, gradients[len(leaves) :], strict=True) if grad is not None}


def modules_to_replace(backbone: nn.Module, trace: Trace) -> list[str]:
    """List the outermost modules that ran before the end of the stage only and hold nothing needed after it."""
    needed = {trace.end} | trace.after | trace.reached
    chosen: list[str] = []
    for path, _ in backbone.named_modules(remove_duplicate=False):
        inside_chosen = any(path.startswith(f"{other}.") for other in chosen)
        holds_needed = any(name.startswith(f"{path}.") for name in needed)
        if path in trace.ran - trace.after and not inside_chosen and not holds_needed:
            chosen.append(path)
    return chosen


def put_placeholders(tail: Tail, trace: Trace, paths: list[str]) -> None:
    """Replace modules by their placeholders; the one that ends the stage gets the stage's hook."""
    for path in paths:
        if path in trace.placeholders:
            tail.backbone.set_submodule(path, trace.placeholders[path])
            if path == trace.end:
                attach_stage_hook(trace.placeholders[path], tail.stage)


def drop_parameters(backbone: nn.Module, trace: Trace) -> None:
    """Replace the parameters that are not reached by zeros that are neither trained nor saved."""
    for name, parameter in list(backbone.named_parameters()):
        if name not in trace.reached:
            owner, _, leaf = name.rpartition(".")
            module = backbone.get_submodule(owner)
            delattr(module, leaf)
            module.register_buffer(leaf, parameter.new_zeros(()).expand(parameter.shape), persistent=False)


def _tensors(output: Any) -> list[Tensor]:
    """List the tensors in a nested output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
