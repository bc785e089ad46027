"""What a method is: hyper-parameters, the terms of a loss, and what only trains."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..outputs import MultiExitOutput

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
            they are left out behind the scaffold, because mixed precision copies everything that a model returns. Not
            inherited.
        min_exits: Exits the method needs, the deepest included.
        tasks: Which models it can train, by their ``task``.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    detach_exits: ClassVar[bool] = False
    reads_maps: ClassVar[bool] = True
    min_exits: ClassVar[int] = 1
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)

    def __init_subclass__(cls, *, registered: bool = True, **kwargs):
        super().__init_subclass__(**kwargs)
        if "reads_maps" not in vars(cls):
            cls.reads_maps = True  # not inherited: a method that adds to another may read them
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


def list_methods() -> list[str]:
    """List the names of all methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str, **hyper_parameters) -> Method:
    """Create a method by its name.

    Args:
        name: One of :func:`list_methods`, or several joined as in ``"eed+lsh"``.
        hyper_parameters: Fields of the method; what is left out keeps the paper's value. Of several methods, a
            dictionary for each: ``get_method("eed+lsh", lsh={"mimic_weight": 5.0})``.

    Raises:
        ValueError: If there is no such method or hyper-parameter, or a value is out of range.

    Example:
        >>> get_method("byot", alpha=0.5)
        BYOT(alpha=0.5, temperature=3.0, hint_weight=0.03)
    """
    if "+" in name:
        from .combination import combine  # here because a combination is a method itself

        return combine(name.split("+"), hyper_parameters)
    if name not in _METHODS:
        raise ValueError(f"Unknown method '{name}'.{_near(name, _METHODS)} Available: {', '.join(list_methods())}.")
    method = _METHODS[name]
    check_hyper_parameters(method.__name__, hyper_parameters, [field.name for field in fields(method)])
    return method(**hyper_parameters)


def check_hyper_parameters(owner: str, given: Iterable[str], known: list[str]) -> None:
    """Raise ValueError if ``owner`` has no hyper-parameter of a name that was given."""
    for name in given:
        if name not in known:
            raise ValueError(
                f"{owner} has no hyper-parameter '{name}'.{_near(name, known)} "
                f"Available: {', '.join(known) or 'none'}."
            )


def _near(word: str, words: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""


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
