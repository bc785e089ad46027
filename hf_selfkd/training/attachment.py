"""What a method attaches to the model: it comes off when training ends, and returns for the next training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import Trainer

# What Method.attach sets on a model.
_PARTS = ("scaffold", "detach_exits", "returns_maps")


class Attachment:
    """Keeps what the method of a trainer attached to its model, while it is not on the model.

    Args:
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`, whose model has it until the first training ends.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._parts: dict[str, Any] | None = None

    @property
    def scaffold(self) -> nn.Module | None:
        """The scaffold of the last training, or of the next one before the first."""
        return self._trainer.network.scaffold if self._parts is None else self._parts["scaffold"]

    @contextmanager
    def on_the_model(self) -> Iterator[None]:
        """Put it on the model during training. It comes off however training ends, and keeps its state."""
        trainer = self._trainer
        if self._parts is not None and trainer.model_init is None:  # which builds a model with a scaffold of its own
            for name, part in self._parts.items():
                setattr(trainer.network, name, part)
        self._parts = None
        try:
            yield
        finally:
            trainer.is_in_train = False  # which Trainer leaves set after an interrupt
            if trainer.model is not None:
                self._parts = {name: getattr(trainer.network, name) for name in _PARTS}
                trainer.method.detach(trainer.model)
