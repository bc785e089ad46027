"""Hyper-parameters of the method in ``hyperparameter_search``, and the objective of a search."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from transformers import Trainer

from ..methods import Method
from ..methods.combination import Combination
from ..models.did_you_mean import did_you_mean
from ..tasks import task_of


def names_of(method: Method) -> list[str]:
    """Return the names of a method's hyper-parameters, for a combination as in ``eed.temperature``."""
    if isinstance(method, Combination):
        return [f"{part.name}.{name}" for part in method.methods for name in names_of(part)]
    return [field.name for field in fields(method)]


def with_values(method: Method, values: dict[str, Any]) -> Method:
    """Return a method with other values of some hyper-parameters, by the names of :func:`names_of`."""
    if not isinstance(method, Combination):
        return replace(method, **values)
    parts = []
    for part in method.methods:
        chosen = {name: values.get(f"{part.name}.{name}", getattr(part, name)) for name in names_of(part)}
        parts.append(with_values(part, chosen))
    return replace(method, methods=tuple(parts))


class SearchSpace:
    """A space of ``hyperparameter_search`` that may name hyper-parameters of the method.

    Args:
        hp_space: From a trial to values by name, as ``Trainer`` takes it.
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`.
    """

    def __init__(self, hp_space: Callable[[Any], dict[str, Any]], trainer: Trainer):
        self.hp_space = hp_space
        self.method = trainer.method
        self.args = trainer.args

    def __call__(self, trial: Any) -> dict[str, Any]:
        """Return the values of a trial for ``TrainingArguments``, or the complete space without one (Ray, W&B).

        Raises:
            ValueError: If a name is neither in ``TrainingArguments`` nor a hyper-parameter of the method.
        """
        values, own = self.hp_space(trial), names_of(self.method)
        if trial is None:
            return values
        for name in values:
            if name not in own and not hasattr(self.args, name):
                raise ValueError(
                    f"hp_space names {name!r}, which is neither in TrainingArguments nor a hyper-parameter of "
                    f"{self.method.name} ({', '.join(own)}).{did_you_mean(name, [*own, *vars(self.args)])}"
                )
        return {name: value for name, value in values.items() if name not in own}

    def method_of(self, trial: Any) -> Method:
        """Return the method with the hyper-parameters of a trial."""
        values = trial if isinstance(trial, dict) else self.hp_space(trial)
        return with_values(self.method, {name: values[name] for name in names_of(self.method) if name in values})


def direction_of(direction: str | list[str] | None, compute_objective: Callable | None) -> str | list[str]:
    """Return the direction of a search: up for the default objective, down for one's own unless given, as in Trainer.

    Raises:
        ValueError: If another direction is given for the default objective.
    """
    if compute_objective is not None:
        return "minimize" if direction is None else direction
    if direction not in (None, "maximize"):
        raise ValueError(
            f"The default objective is the accuracy (or mean IoU) of the final exit, which direction={direction!r} "
            "contradicts. Leave it out, or pass compute_objective=lambda metrics: metrics['eval_loss']."
        )
    return "maximize"


def headline_metric(trainer: Trainer, metrics: dict[str, float]) -> float:
    """Return the default objective: the headline metric of the final exit.

    Raises:
        ValueError: If the evaluation has no such metric, such as with several evaluation sets.
    """
    name = f"eval_{task_of(trainer.network).metric}"
    if name not in metrics:
        raise ValueError(
            f"The default objective of a search is {name}, but the evaluation has {', '.join(metrics)}. Pass "
            "compute_objective, a function of these metrics."
        )
    return metrics[name]
