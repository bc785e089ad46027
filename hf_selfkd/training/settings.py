"""Settings of a run: checked, and copied where this trainer differs from the stock one."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..methods import Method
from ..methods.base import multi_exit_model
from ..model_card.facts import collect_facts
from ..models.checkpoint_files import shorten
from ..models.rebuild import check_rebuilds
from ..tasks import task_of
from .adapters import is_adapted, warn_of_frozen_heads
from .batches import is_indexed
from .hub import HiddenToken
from .refused_arguments import check_refused


def check_settings(
    args: TrainingArguments, card: dict[str, Any], max_skipped_batches: int, *, has_milestones: bool
) -> None:
    """Check settings before training.

    Raises:
        ValueError: If they contradict each other.
        TypeError: If the facts for the model card have an unknown key.
    """
    if args.fp16 and max_skipped_batches:
        raise ValueError("fp16 skips such batches itself. Leave max_skipped_batches at 0, or use bf16.")
    if has_milestones and (args.lr_scheduler_type != SchedulerType.LINEAR or args.lr_scheduler_kwargs):
        raise ValueError(
            f"lr_milestones replace lr_scheduler_type, but both were given (lr_scheduler_type="
            f"{args.lr_scheduler_type.value!r}, lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}). Leave one out."
        )
    check_refused(args)
    known = list(inspect.signature(collect_facts).parameters)[2:]
    if unknown := sorted(card.keys() - set(known)):
        raise TypeError(f"card has the unknown keys {', '.join(unknown)}. It takes {', '.join(known)}.")


def check_optimizers(optimizers: tuple[Any, ...], *, has_milestones: bool, decay_norms: bool) -> None:
    """Raise ValueError if an optimizer or scheduler of the user's own makes another setting meaningless.

    Args:
        optimizers: The optimizer and the scheduler, ``None`` where the trainer builds it.
        has_milestones: Whether there are ``lr_milestones``.
        decay_norms: The trainer's setting.
    """
    optimizer, scheduler, *_ = optimizers
    if scheduler is not None and has_milestones:
        raise ValueError("lr_milestones build a scheduler, but optimizers holds one. Leave one of them out.")
    if optimizer is not None and decay_norms:
        raise ValueError(
            "decay_norms groups the parameters of the optimizer that the trainer builds, but optimizers holds one. "
            "Leave it out, and group the parameters yourself."
        )


def own_arguments(args: TrainingArguments) -> TrainingArguments:
    """Return a copy of the arguments with the decisions of the trainer.

    A shallow copy: building ``TrainingArguments`` again would reset the state of Accelerate.
    """
    args = copy.copy(args)
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every parameter gets a gradient in every step
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # equal from the start; batch norm is averaged when it is needed
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # torch would warn that it cannot
    args.logging_nan_inf_filter = False  # would read the loss twice a batch; NonFiniteGuard reads it once a step
    args.enable_jit_checkpoint = False  # saves within a step, from where no run continues exactly; see SaveOnSigterm
    args.label_names = ["labels"]  # Trainer would not find them in what wraps the model
    if (args.metric_for_best_model or "").endswith("calibration_error"):
        args.greater_is_better = False  # Trainer takes all but a loss for greater is better
    if args.hub_token is not None:
        args.hub_token = HiddenToken(args.hub_token)
    return args


def attach_method(
    method: Method,
    model: nn.Module,
    args: TrainingArguments,
    *,
    has_mix: bool,
    per_class: bool = False,
    data: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Attach a method to a model, with a scaffold that is equal on all processes.

    A scaffold that the method has attached before stays where an optimizer is given, which holds its parameters.

    Args:
        method: The method.
        model: A multi-exit model, or a module that wraps one.
        args: Settings of the run.
        has_mix: Whether images are mixed.
        per_class: Whether the card has results per class.
        data: The training data, ``None`` if there is none.
        optimizer: The user's own, ``None`` if the trainer builds it.

    Raises:
        ValueError: If the model cannot be trained with the method or these settings, or the optimizer lacks
            parameters that train.
    """
    network = multi_exit_model(model)
    network.config.check()  # fields may have been set since the model was built
    method.check(network)
    if per_class and task_of(network).class_counts is None:
        raise ValueError(f"card has per_class=True, but {network.task} has no single class per image. Leave it out.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("No parameter is left to train: the backbone is frozen and the model has no exits.")
    task = task_of(network)
    if not task.takes_soft_labels and (args.label_smoothing_factor or has_mix):
        raise ValueError(
            f"label_smoothing_factor and mix make probabilities of labels, which {network.task} does not take. Do not "
            "set them."
        )
    if not task.takes_label_smoothing and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} spreads one label over all classes, but "
            f"{network.task} has a label for every class. Leave it at 0; labels of the data may be probabilities."
        )
    warn_of_frozen_heads(model)
    if args.save_strategy != SaveStrategy.NO and not is_adapted(network):
        with swapped(network, scaffold=None):
            check_rebuilds(network, network.state_dict())
    if method.reads_indices:
        check_indexed(method, data, has_mix=has_mix)
    if optimizer is None or getattr(network.scaffold, "attached_by", None) != method:
        torch.manual_seed(args.seed)
        method.attach(network, len(data) if is_indexed(data) else None)
    network.add_model_tags(method.name.split("+"))
    if optimizer is not None:
        _check_optimizer(optimizer, model)


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = model.named_parameters()
    if missing := [name for name, parameter in named if parameter.requires_grad and id(parameter) not in given]:
        raise ValueError(
            f"The optimizer lacks parameters that train: {shorten(missing)}. Call method.attach(model) before "
            "building it from model.parameters(), and requires_grad_(False) on what is not to train."
        )


def check_indexed(method: Method, data: Any, *, has_mix: bool) -> None:
    """Raise ValueError if training images cannot be identified by their indices, which the method needs."""
    needs = f"Method '{method.name}' keeps something for each training image, "
    if has_mix:
        raise ValueError(f"{needs}but mix makes one image of two. Do not set it.")
    if data is not None and not is_indexed(data):
        raise ValueError(
            f"{needs}but {type(data).__name__} has no index. Train on data that is indexed from 0 and has a "
            "length; streams are not."
        )


@contextmanager
def swapped(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of an object temporarily."""
    kept = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)
