"""Settings of a run: checked, and copied where this trainer differs from the stock one."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..methods import Method
from ..methods.base import multi_exit_model
from ..model_card.facts import collect_facts
from ..tasks import task_of
from .batches import is_indexed
from .hub import HiddenToken


def check_settings(
    args: TrainingArguments, card: dict[str, Any], max_skipped_batches: int, *, has_own_metrics: bool
) -> None:
    """Check settings before training.

    Raises:
        ValueError: If they contradict each other.
        TypeError: If the facts for the model card have an unknown key.
    """
    if args.fp16 and max_skipped_batches:
        raise ValueError("fp16 skips such batches itself. Leave max_skipped_batches at 0, or use bf16.")
    if args.batch_eval_metrics and not has_own_metrics:
        raise ValueError(
            "batch_eval_metrics needs your own compute_metrics. Do not set it: the built-in metrics need no logits."
        )
    known = list(inspect.signature(collect_facts).parameters)[2:]
    if unknown := sorted(card.keys() - set(known)):
        raise TypeError(f"card has the unknown keys {', '.join(unknown)}. It takes {', '.join(known)}.")


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
    if args.hub_token is not None:
        args.hub_token = HiddenToken(args.hub_token)
    return args


def attach_method(
    method: Method, model: nn.Module, args: TrainingArguments, *, has_mix: bool, data: Any = None
) -> None:
    """Attach a method to a model, with a scaffold that is equal on all processes.

    Args:
        method: The method.
        model: A multi-exit model, or a module that wraps one.
        args: Settings of the run.
        has_mix: Whether images are mixed.
        data: The training data, ``None`` if there is none.

    Raises:
        ValueError: If the model cannot be trained with the method or these settings.
    """
    network = multi_exit_model(model)
    method.check(network)
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
    if method.reads_indices:
        check_indexed(method, data, has_mix=has_mix)
    torch.manual_seed(args.seed)
    method.attach(network, len(data) if is_indexed(data) else None)
    network.add_model_tags(method.name.split("+"))


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
