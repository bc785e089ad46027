"""Training arguments that describe the complete run to what tracks experiments."""

import copy
from functools import partial
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from ..model_card.facts import name_of


class _RunArguments:
    """Added to the class of the arguments. They are pickled as they were given, without it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments, and what :func:`describe_run` adds."""
        return super().to_dict() | self.describe()

    def __reduce_ex__(self, protocol):
        given = object.__new__(type(self).__bases__[1])
        given.__dict__.update({name: value for name, value in vars(self).items() if name != "describe"})
        return copy.copy, (given,)


def described(args: TrainingArguments, trainer: Trainer) -> TrainingArguments:
    """Return a copy of the arguments whose ``to_dict`` also holds the method and the trainer's own settings.

    TensorBoard, trackio, W&B and the others store this dictionary when training begins.

    Args:
        args: Arguments of the run.
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`.
    """
    kind = type(args)
    copied = object.__new__(type(kind.__name__, (_RunArguments, kind), {"__module__": kind.__module__}))
    copied.__dict__.update(vars(args), describe=partial(describe_run, trainer))
    return copied


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """Return the method with its hyper-parameters and the trainer's own settings, as JSON can hold them."""
    return {
        "method": _named(trainer.method.to_dict()),
        "lr_milestones": list(trainer.lr_milestones),
        "lr_gamma": trainer.lr_gamma,
        "decay_norms": trainer.decay_norms,
        "exit_learning_rate": trainer.exit_learning_rate,
        "layer_decay": trainer.layer_decay,
        "class_weights": trainer.balance.description,
        "balanced_sampling": trainer.balance.sampling,
        "ema_decay": None if trainer.average is None else trainer.average.decay,
        "mix": None if trainer.mix is None else getattr(trainer.mix, "__name__", type(trainer.mix).__name__),
        "max_skipped_batches": trainer.nonfinite.max_skipped_batches,
    }


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """Replace networks, such as teachers, by their names."""
    return {
        name: _named(value) if isinstance(value, dict) else name_of(value) if isinstance(value, nn.Module) else value
        for name, value in values.items()
    }
