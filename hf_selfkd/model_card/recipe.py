"""Training settings of a run for its model card: the important ones, and others that differ from their defaults."""

from collections.abc import Iterable
from dataclasses import fields
from enum import Enum
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments

from .environment import device_name

# Meaningless with an optimizer that the user passed.
_OPTIMIZER = ("learning_rate", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Replaced by milestones.
_SCHEDULER = ("lr_scheduler_type", "lr_scheduler_kwargs")
_OTHERS = (
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "label_smoothing_factor",
    "load_best_model_at_end",
    "metric_for_best_model",
    "bf16",
    "fp16",
    "seed",
)
# Listed even at transformers' defaults.
_ALWAYS = ("learning_rate", "optim", "per_device_train_batch_size", "seed")


def training_recipe(trainer: Trainer) -> dict[str, Any]:
    """Return the training settings of a :class:`~hf_selfkd.SelfDistillationTrainer` by name."""
    args = trainer.args
    recipe = _duration(args, trainer.state)
    if trainer.has_own_optimizer:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        recipe["optimizer"] = type(optimizer).__name__
    scheduler = () if trainer.lr_milestones else _SCHEDULER
    names = _OTHERS if trainer.has_own_optimizer else (*_OPTIMIZER, *scheduler, *_OTHERS)
    recipe |= _changed_arguments(args, names)
    if trainer.lr_milestones:
        recipe |= {"lr_milestones": list(trainer.lr_milestones), "lr_gamma": trainer.lr_gamma}
    own = {
        "decay_norms": trainer.decay_norms,
        "class_weights": trainer.balance.description,
        "balanced_sampling": trainer.balance.sampling,
        "ema_decay": None if trainer.average is None else trainer.average.decay,
        "mix": None if trainer.mix is None else getattr(trainer.mix, "__name__", type(trainer.mix).__name__),
        "frozen backbone": trainer.network._backbone_frozen,
        "processes": args.world_size if args.world_size > 1 else None,
    }
    return recipe | {name: value for name, value in own.items() if value} | {"device": device_name(args.device)}


def _duration(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    recipe = {"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}
    if state.global_step < state.max_steps:
        recipe["steps trained"] = f"{state.global_step} of {state.max_steps}"
    if args.load_best_model_at_end and state.best_global_step:
        recipe["best step"] = f"{state.best_global_step} of {state.max_steps}"
    return recipe


def _changed_arguments(args: TrainingArguments, names: Iterable[str]) -> dict[str, Any]:
    defaults = {argument.name: argument.default for argument in fields(TrainingArguments)}
    values = {name: getattr(args, name) for name in names}
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in values.items()
        if name in _ALWAYS or value != defaults[name]
    }
