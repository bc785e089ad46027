"""Copies of what lies behind a stage of a backbone: branches that read one trunk.

A copy is the backbone itself with placeholders for all that runs before the stage, so that no family needs code of its
own: the hook at the stage puts the trunk's output in.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Collector, join_features, run
from .stages import Anatomy
from .timm_quirks import classifiers, copy_module

# What running a network on placeholders can raise where it reads more of them than their outputs.
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class _Replacement(Collector):
    """Puts another output in the place of a stage's.

    Args:
        stage: Index of the stage.
        output: What stands for its output.
    """

    def __init__(self, stage: int, output: Any):
        super().__init__()
        self.stage = stage
        self.output = output

    def on_stage(self, index: int, output: Any) -> Any:
        # A clone, because some networks go on with an in-place activation, and several tails read this output.
        return _map_tensors(Tensor.clone, self.output) if index == self.stage else None


class Tail(nn.Module):
    """Everything behind a stage of a backbone; made by :func:`copy_tail`.

    Its state has the names of the backbone's, so that it can be loaded there.

    Args:
        backbone: The backbone, with placeholders for what runs before the stage.
        anatomy: What :func:`~hf_selfkd.models.hooks.measure` found.
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
        """What turns features into logits: one linear module, or several whose logits are averaged."""
        return classifiers(self.backbone)


class _Placeholder(nn.Module):
    """Gives zeros shaped like the output of the module it stands for, which does not matter.

    Args:
        module: Its plain attributes are kept, because networks read such things as the grid of their patches.
        rows: Length of the first dimension of the tensor it was given: the batch, or more where windows are folded in.
        output: What it gave.
    """

    def __init__(self, module: nn.Module, rows: int, output: Any):
        super().__init__()
        plain = (bool, int, float, str, tuple, type(None))
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, plain):
                setattr(self, name, value)
        self._shapes = _map_tensors(lambda tensor: tensor.shape, output)
        self._rows = rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._zeros(self._shapes, _tensors(args)[0])

    def _zeros(self, shapes: Any, like: Tensor) -> Any:
        if isinstance(shapes, torch.Size):
            rows = shapes[0] * like.shape[0] // self._rows
            return like.new_zeros(()).expand(rows, *shapes[1:])
        return (
            type(shapes)(self._zeros(item, like) for item in shapes) if isinstance(shapes, (list, tuple)) else shapes
        )


def copy_tail(
    backbone: nn.Module,
    anatomy: Anatomy,
    stage: int,
    create: Callable[[], nn.Module],
    image_shape: tuple[int, int, int],
) -> Tail:
    """Copy everything behind a stage, freshly initialised.

    With the backbone's own weights the copy must give its logits and features bit by bit on random images; then it
    gets those of a new backbone. It holds parameters for what it computes and for nothing else.

    Args:
        backbone: A model that :func:`~hf_selfkd.models.hooks.attach_hooks` was called on.
        anatomy: What :func:`~hf_selfkd.models.hooks.measure` found.
        stage: Index of the stage.
        create: Builds the backbone anew.
        image_shape: Channels, height and width of an image that the backbone takes.

    Raises:
        ValueError: If there is no such stage, or the network is no chain there: what lies behind reads more than this
            one output.
    """
    if not 0 <= stage < len(anatomy.stages):
        raise ValueError(
            f"The backbone has stages 0 to {len(anatomy.stages) - 1}, but copy_tail was asked for {stage}."
        )
    refused = (
        f"What lies behind stage {stage} of this {type(backbone).__name__} cannot be copied: the network is no chain "
        "there. Choose another stage or another backbone."
    )
    if not anatomy.hooked:
        raise ValueError(refused)
    copied = copy_module(backbone).requires_grad_(True)
    copied.train().eval()  # some networks keep what they computed from their weights until they are trained again
    copied.set_grad_checkpointing(False)
    reference = next(copied.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, *image_shape, generator=generator).to(reference)
    tail = Tail(copied, anatomy, stage, image_shape)
    try:
        trace = _Trace(tail, images[:3])
        stage_output, *expected = _answer(tail, images[3:])
        _remove_trunk(tail, trace)
        with torch.no_grad():
            answer = tail(stage_output)
    except _FAILURES as error:
        raise ValueError(refused) from error
    if not all(torch.equal(ours, theirs) for ours, theirs in zip(answer, expected, strict=True)):
        raise ValueError(refused)
    fresh = create().state_dict()
    copied.load_state_dict({name: fresh[name] for name in copied.state_dict()})
    return tail.train()


@torch.no_grad()
def _answer(tail: Tail, images: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Return the stage's output, logits and features of the whole backbone."""
    seen = Collector()
    logits = run(tail.backbone, tail.anatomy, images, seen)
    return seen.outputs[tail.stage], logits, join_features(seen.features)


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
        self.output = _map_tensors(lambda tensor: tensor.detach().clone().requires_grad_(), output)
        return _map_tensors(Tensor.clone, self.output)


class _Trace:
    """What one run of the whole backbone tells about its parts.

    Args:
        tail: Holds the whole backbone.
        images: ``(batch, channels, height, width)``.

    Attributes:
        ran: Paths of the modules that ran.
        placeholders: What could stand for them, by path, where they were given a tensor.
        behind: Paths of the modules that still ran after the stage had ended.
        reached: Names of the parameters that logits or features depend on, once the stage's output is given.
    """

    def __init__(self, tail: Tail, images: Tensor):
        self.placeholders: dict[str, _Placeholder] = {}
        self.ran: set[str] = set()
        self.behind: set[str] = set()
        self._ended = False
        end = tail.anatomy.stages[tail.stage].module
        handles = [
            module.register_forward_hook(partial(self._record, path, path == end))
            for path, module in tail.backbone.named_modules()
        ]
        try:
            self.reached = self._reached(tail, images)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, path: str, ends: bool, module: nn.Module, args: Any, output: Any) -> None:
        if given := _tensors(args):
            self.placeholders[path] = _Placeholder(module, len(given[0]), output)
        self.ran.add(path)
        if self._ended:
            self.behind.add(path)
        self._ended |= ends

    @torch.enable_grad()
    def _reached(self, tail: Tail, images: Tensor) -> set[str]:
        visitor = _Leaf(tail.stage)
        logits = run(tail.backbone, tail.anatomy, images, visitor)
        given = _tensors(visitor.output)
        total = logits.float().sum() + join_features(visitor.features).float().sum()
        names, parameters = zip(*tail.backbone.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, [*given, *parameters], allow_unused=True)
        if all(gradient is None for gradient in gradients[: len(given)]):
            raise ValueError("Nothing behind the stage reads its output.")
        return {name for name, grad in zip(names, gradients[len(given) :], strict=True) if grad is not None}


def _remove_trunk(tail: Tail, trace: _Trace) -> None:
    """Put placeholders in the place of what ran only up to the stage, and zeros in that of parameters left over."""
    end = tail.anatomy.stages[tail.stage].module
    needed = trace.behind | trace.reached
    removed: list[str] = []
    for path, module in list(tail.backbone.named_modules(remove_duplicate=False)):
        inside = f"{path}."
        if not path or end.startswith(inside) or any(path.startswith(other) for other in removed):
            continue
        if path in trace.ran and not any(name == path or name.startswith(inside) for name in needed):
            removed.append(inside)
            if path in trace.placeholders:
                tail.backbone.set_submodule(path, trace.placeholders[path])
            if path == end:
                for hook in module._forward_hooks.values():
                    trace.placeholders[path].register_forward_hook(hook)
    for name, parameter in list(tail.backbone.named_parameters()):
        if name not in trace.reached:
            owner, _, leaf = name.rpartition(".")
            module = tail.backbone.get_submodule(owner)
            delattr(module, leaf)
            module.register_buffer(leaf, parameter.new_zeros(()).expand(parameter.shape), persistent=False)


def _map_tensors(function: Callable[[Tensor], Any], output: Any) -> Any:
    """Apply a function to a tensor, or to each in a list or tuple."""
    if isinstance(output, (list, tuple)):
        return type(output)(_map_tensors(function, item) for item in output)
    return function(output) if isinstance(output, Tensor) else output


def _tensors(output: Any) -> list[Tensor]:
    """List the tensors in a tensor, list or tuple."""
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in _tensors(item)]
    return [output] if isinstance(output, Tensor) else []
