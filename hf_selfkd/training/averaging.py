"""A moving average of the weights, kept beside training."""

from collections.abc import Iterator
from contextlib import contextmanager

from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import TrainerCallback

from .distributed import is_sharded


class WeightAverage(TrainerCallback):
    """Exponential moving average of what ships, by timm's ``ModelEmaV3``.

    Checkpoints hold both: the trained weights as the model's, the averaged ones beside them.

    Args:
        decay: Share of the average that stays at each step, in [0, 1).
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), but got {decay!r}.")
        self.decay = decay
        self.start: dict[str, Tensor] | None = None
        self.final: dict[str, Tensor] | None = None

    @staticmethod
    def _shipped(model: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({name: child for name, child in model.named_children() if name != "scaffold"})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights under the model's names."""
        return self.ema.module.state_dict()

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Start from the weights as they are, or from those of a checkpoint.

        Raises:
            ValueError: If the weights are sharded.
        """
        if is_sharded(model):
            raise ValueError(
                "ema_decay needs whole weights on every process, but they are sharded (FSDP). Train without "
                "ema_decay, or without FSDP."
            )
        self.final = None
        self.ema = ModelEmaV3(self._shipped(model), decay=self.decay)
        if self.start is not None:
            self.ema.module.load_state_dict(self.start)
            self.start = None

    def on_step_end(self, args, state, control, model, **kwargs):
        """Follow the weights by one step."""
        self.ema.update(self._shipped(model))

    def on_train_end(self, args, state, control, model, **kwargs):
        """Leave the averaged weights in the model: the last, or those of the best checkpoint."""
        model.load_state_dict(self.state_dict() if self.final is None else self.final, strict=False)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Swap the averaged weights in, and the trained ones back afterwards."""
        trained = {name: tensor.clone() for name, tensor in self._shipped(model).state_dict().items()}
        model.load_state_dict(self.state_dict(), strict=False)
        try:
            yield
        finally:
            model.load_state_dict(trained, strict=False)
