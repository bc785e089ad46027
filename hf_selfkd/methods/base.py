"""Base class of the methods: hyper-parameters, the terms of a loss, and the modules used only in training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..functional import binary_kl, soften_kl
from ..models.multi_label import MULTI_LABEL
from ..models.outputs import MultiExitOutput
from .averaged_teacher import averaged_teachers

_METHODS: dict[str, type["Method"]] = {}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A self-distillation method. Subclass it in a file of :mod:`hf_selfkd.methods`, or in your own code.

    A subclass is a frozen, keyword-only dataclass: its fields are its hyper-parameters, with the paper's values as
    defaults. Defining it registers it under ``name``, except as ``class ...(Method, registered=False)``.

    Attributes:
        name: Its name in ``get_method`` and on the command line.
        paper: URL of the paper that defines it.
        detach_exits: Whether auxiliary exits read detached feature maps, because the paper has no exits: the backbone
            then trains as without them. The trainer adds their label loss as the term ``exits``. A property if it
            depends on a hyper-parameter.
        reads_maps: Whether the loss itself reads ``output.exit_maps`` or ``output.stage_outputs``. Otherwise they are
            removed from the output after the scaffold, because mixed precision copies everything a model returns.
        reads_indices: Whether it reads ``output.sample_indices``: the training data must then be indexed, and its
            images must not be mixed.
        min_exits: Number of exits that the method needs, the final exit included.
        tasks: The tasks it can train, as in ``model.task``. Those with ``multi-label-classification`` take their
            losses from the output: ``output.label_loss`` and :func:`divergence_of`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    detach_exits: ClassVar[bool] = False
    reads_maps: ClassVar[bool] = False
    reads_indices: ClassVar[bool] = False
    min_exits: ClassVar[int] = 1
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)

    def __init_subclass__(cls, *, registered: bool = True, **kwargs):
        super().__init_subclass__(**kwargs)
        if not registered:
            return
        taken_by = _METHODS.get(cls.name, cls)
        # The same class may be defined again, by a reloaded module or a notebook cell.
        if (taken_by.__module__, taken_by.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"Method name '{cls.name}' is taken by {taken_by.__module__}.{taken_by.__qualname__}.")
        _METHODS[cls.name] = cls

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, all scalars.

        Args:
            output: The output of the model in training mode.
            labels: Class indices ``(batch,)``, or probabilities ``(batch, classes)``; for a multi-label model as
                :func:`~hf_selfkd.functional.binary_cross_entropy` takes them.
            epoch: Progress of the run in epochs, a float as in ``TrainerState``.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(output, labels, epoch).")

    def scaffold(self, model: nn.Module) -> nn.Module | None:
        """Return the module that is used only in training, such as a self-teacher, or ``None``.

        The module is called as ``scaffold(pixel_values, output)`` at the end of ``model.forward`` in training and
        returns a dictionary, which becomes ``output.scaffold``.
        """
        return None

    def metrics(self, output: MultiExitOutput) -> dict[str, Tensor]:
        """Return scalars to monitor, which are not part of the loss; the trainer logs their means."""
        return {}

    def allocate(self, scaffold: nn.Module | None, num_images: int) -> None:
        """Make room in the scaffold for what it keeps for each training image, before it is loaded or prepared."""

    def prepare(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """Initialise the scaffold from the training data, once before the first step of a new run.

        Called in eval mode and without gradients; ``batches`` are this process's training batches and can be iterated
        more than once. The result must be equal on all processes. The default is that averaged teachers start from the
        weights of the model.
        """
        for teacher in averaged_teachers(model.scaffold):
            teacher.start(model)

    def after_step(self, model: nn.Module) -> None:
        """Update the scaffold after a step of the optimizer: averaged teachers follow the weights of the model."""
        model = multi_exit_model(model)
        for teacher in averaged_teachers(model.scaffold):
            teacher.follow(model)

    def remember(self, output: MultiExitOutput) -> None:
        """Keep in the scaffold what later epochs need of an output; called after its terms are computed."""

    def attach(self, model: nn.Module, num_images: int | None = None) -> None:
        """Prepare a model for training with this method, before the first step of a training loop.

        Checks the model, builds the scaffold, and sets ``detach_exits`` and ``returns_maps``. In a wrapped model
        (PEFT, ``torch.compile``, data parallel) the multi-exit model inside is prepared. Build the optimizer
        afterwards, so that it includes the parameters of the scaffold. :meth:`detach` reverts it.

        Args:
            model: A multi-exit model.
            num_images: Number of training images, for methods that keep something for each; ``None`` if not known.

        Raises:
            ValueError: If ``model`` cannot be trained with this method.
        """
        model = multi_exit_model(model)
        self.check(model)
        model.scaffold = None  # that of an earlier run, which a copy of the model would hold
        model.scaffold = self.scaffold(model)
        self.allocate(model.scaffold, num_images or 0)
        if model.scaffold is not None:
            model.scaffold.attached_by = self
        model.detach_exits = self.detaches_exits(model.scaffold)
        model.returns_maps = self.reads_maps

    def detach(self, model: nn.Module) -> None:
        """Revert :meth:`attach`."""
        model = multi_exit_model(model)
        model.scaffold, model.detach_exits, model.returns_maps = None, False, True

    def terms(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return all terms of the loss: those of the method, and ``exits`` for exits that read detached feature maps.

        A training loop minimises their sum. Arguments as in :meth:`__call__`.

        Raises:
            ValueError: If the output is that of a multi-label model, which this method cannot train.
        """
        if output.is_multi_label:  # attach checks it too, but problem_type may have changed since
            self._check_task(MULTI_LABEL, "the model")
        terms = self(output, labels, epoch)
        if self.leaves_out_exits(output):
            terms["exits"] = output.label_loss(output.exit_logits[:-1], labels)
        return terms

    def detaches_exits(self, scaffold: nn.Module | None) -> bool:
        """Whether auxiliary exits read detached feature maps, given the scaffold."""
        return self.detach_exits

    def leaves_out_exits(self, output: MultiExitOutput) -> bool:
        """Whether there are auxiliary exits that the method's own terms do not train."""
        return self.detach_exits and len(output.exit_logits) > 1

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if ``model`` cannot be trained with this method."""
        self._check_task(model.task, type(model).__name__)
        if model.config.num_labels < 2 and model.task != MULTI_LABEL:
            raise ValueError(
                f"A model with num_labels={model.config.num_labels} has nothing to learn: its loss is always 0. Build "
                "it with num_labels=2 for two classes, of which one may be the background."
            )
        if model.num_exits < self.min_exits:
            raise ValueError(
                f"{type(self).__name__} needs at least {self.min_exits} exits, but the model has {model.num_exits}. "
                "Build it with exits, such as exits=[1, 2, 3]."
            )

    def _check_task(self, task: str, model: str) -> None:
        if task not in self.tasks:
            able = sorted(name for name, method in _METHODS.items() if task in method.tasks)
            raise ValueError(
                f"{type(self).__name__} trains models for {' and '.join(self.tasks)}, but {model} is one for {task}. "
                f"Methods for {task}: {', '.join(able)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return name and hyper-parameters: ``get_method(**method.to_dict()) == method``."""
        return {"name": self.name} | {field.name: getattr(self, field.name) for field in fields(self)}


def multi_exit_model(model: nn.Module) -> nn.Module:
    """Return the multi-exit model inside a module that may wrap it.

    Raises:
        ValueError: If there is none.
    """
    found = next((module for module in model.modules() if "exit_stages" in vars(module)), None)
    if found is None:
        raise ValueError(
            f"Expected a multi-exit model, but got {type(model).__name__}. Build one with "
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


def divergence_of(output: MultiExitOutput) -> Callable[..., Tensor]:
    """Return what compares the logits of exits: ``soften_kl`` or, of a multi-label model, ``binary_kl``."""
    return binary_kl if output.is_multi_label else soften_kl


def missing_scaffold(method: Method, missing: str) -> ValueError:
    """Return the error for an output that lacks what the method's scaffold returns."""
    return ValueError(
        f"{type(method).__name__} was called without {missing}. Train with SelfDistillationTrainer, or set "
        "model.scaffold = method.scaffold(model)."
    )
