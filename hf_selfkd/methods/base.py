"""What a method is: hyper-parameters, the terms of a loss, and what only trains."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..functional import cross_entropy
from ..models.outputs import MultiExitOutput

_METHODS: dict[str, type["Method"]] = {}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way for a network to teach itself. Subclass it in a file of :mod:`hf_selfkd.methods`, or in your own code.

    A subclass is a frozen, keyword-only dataclass: its fields are its hyper-parameters, their defaults the paper's. It
    is registered under ``name`` as soon as it is defined, unless with ``class ...(Method, registered=False)``.

    Attributes:
        name: What ``get_method`` and the command line call it.
        paper: Where it is defined, a URL.
        detach_exits: Whether auxiliary exits read detached maps, because the paper knows no exits: the backbone then
            learns as without them. The trainer adds their label loss as the term ``exits``. A property where it
            depends on a hyper-parameter.
        reads_maps: Whether the loss itself reads ``output.exit_maps`` or ``output.stage_outputs``. Where it does not,
            they are left out behind the scaffold, because mixed precision copies everything that a model returns.
        min_exits: Exits the method needs, the deepest included.
        tasks: Which models it can train, by their ``task``.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    detach_exits: ClassVar[bool] = False
    reads_maps: ClassVar[bool] = False
    min_exits: ClassVar[int] = 1
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)

    def __init_subclass__(cls, *, registered: bool = True, **kwargs):
        super().__init_subclass__(**kwargs)
        if not registered:
            return
        taken_by = _METHODS.get(cls.name, cls)
        # The same class may come again: its module was reloaded, or its notebook cell run anew.
        if (taken_by.__module__, taken_by.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"Method name '{cls.name}' is taken by {taken_by.__module__}.{taken_by.__qualname__}.")
        _METHODS[cls.name] = cls

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return the terms of the loss, scalars that already carry their weights.

        Args:
            output: The model's answer, in training mode.
            labels: Class indices ``(batch,)``, or probabilities ``(batch, classes)``.
            epoch: Progress of the run in epochs, a float as in ``TrainerState``.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(output, labels, epoch).")

    def scaffold(self, model: nn.Module) -> nn.Module | None:
        """Return what only trains, such as a self-teacher, or ``None``.

        The module is called as ``scaffold(pixel_values, output)`` at the end of ``model.forward`` in training and
        returns a dictionary, which becomes ``output.scaffold``.
        """
        return None

    def metrics(self, output: MultiExitOutput) -> dict[str, Tensor]:
        """Return scalars that are worth watching and no part of the loss; the trainer logs their means."""
        return {}

    def prepare(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """Set up the scaffold from the training data, once before the first step of a fresh run.

        Called in eval mode and without gradient; ``batches`` are this process's training batches and may be gone
        through more than once. The result must be equal on all processes.
        """

    def attach(self, model: nn.Module) -> None:
        """Make a model ready to train with this method: all that a training loop needs before its first step.

        Checks the model, builds the scaffold, and sets what exits read and what the model returns. Of a wrapped model
        (PEFT, ``torch.compile``, data parallel) this happens to the multi-exit model inside. Build the optimizer
        afterwards, so that it holds the parameters of the scaffold. :meth:`detach` undoes it.

        Args:
            model: A multi-exit model.

        Raises:
            ValueError: If ``model`` cannot be trained with this method.
        """
        model = multi_exit_model(model)
        self.check(model)
        model.scaffold = self.scaffold(model)
        model.detach_exits = self.detaches_exits(model.scaffold)
        model.returns_maps = self.reads_maps

    def detach(self, model: nn.Module) -> None:
        """Take off what :meth:`attach` put on: the model is as it was built."""
        model = multi_exit_model(model)
        model.scaffold, model.detach_exits, model.returns_maps = None, False, True

    def terms(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return all terms of the loss: those of the method, and ``exits`` for exits that read detached maps.

        The sum is what a training loop minimises. Takes what :meth:`__call__` takes.
        """
        terms = self(output, labels, epoch)
        if self.leaves_out_exits(output):
            terms["exits"] = cross_entropy(output.exit_logits[:-1], labels)
        return terms

    def detaches_exits(self, scaffold: nn.Module | None) -> bool:
        """Whether auxiliary exits read detached maps, given the scaffold."""
        return self.detach_exits

    def leaves_out_exits(self, output: MultiExitOutput) -> bool:
        """Whether there are auxiliary exits that the method's own terms do not train."""
        return self.detach_exits and len(output.exit_logits) > 1

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if ``model`` cannot be trained with this method."""
        if model.task not in self.tasks:
            able = sorted(name for name, method in _METHODS.items() if model.task in method.tasks)
            raise ValueError(
                f"{type(self).__name__} trains models for {' and '.join(self.tasks)}, but {type(model).__name__} is "
                f"one for {model.task}. For that use {', '.join(able)}."
            )
        if model.num_exits < self.min_exits:
            raise ValueError(
                f"{type(self).__name__} needs at least {self.min_exits} exits, but the model has {model.num_exits}. "
                "Give exits such as [1, 2, 3] when you build it."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return name and hyper-parameters: ``get_method(**method.to_dict()) == method``."""
        return {"name": self.name} | {field.name: getattr(self, field.name) for field in fields(self)}


def multi_exit_model(model: nn.Module) -> nn.Module:
    """Return the multi-exit model in a module that may wrap it.

    Raises:
        ValueError: If there is none.
    """
    found = next((module for module in model.modules() if "exit_stages" in vars(module)), None)
    if found is None:
        raise ValueError(
            f"A multi-exit model is needed, but got {type(model).__name__}. Build one with "
            "MultiExitForImageClassification.from_backbone."
        )
    return found


def check_range(method: Method, name: str, low: float, high: float | None = None, *, strict: bool = False) -> None:
    """Raise ValueError unless ``low <= value <= high``, with ``strict`` unless ``low < value <= high``."""
    value = getattr(method, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and (low < value if strict else low <= value) and (high is None or value <= high):
        return
    if high is None:
        wanted = f"{name} {'>' if strict else '>='} {low:g}"
    else:
        wanted = f"{low:g} {'<' if strict else '<='} {name} <= {high:g}"
    raise ValueError(f"{type(method).__name__} needs {wanted}, but got {name}={value!r}.")
