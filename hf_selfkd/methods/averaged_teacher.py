"""The moving average of the network as its own teacher: ``teacher="ema"``."""

from collections.abc import Iterator

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..models.outputs import MultiExitOutput

# Values of a method's `teacher`: the final exit of the average, and the mean of the logits of all its exits.
FINAL, ENSEMBLE = "ema", "ema_ensemble"
DECAY = 0.999


class AveragedTeacher(nn.Module):
    """A copy of the network whose weights and statistics are the moving average of the network's, by ``ModelEmaV3``.

    It is in eval mode also under ``train()``, without gradients, in float32, and follows the network after every step
    of the optimizer. Checkpoints save it with the scaffold; it takes the memory of one more network.

    Args:
        model: A multi-exit model for classification, without a scaffold.
        decay: Share of the average that remains at each step, in [0, 1); ``None`` is 0.999.
        ensemble: Whether the teacher's logits are the mean over all exits instead of those of the final exit; its
            features are those of the final exit.
    """

    def __init__(self, model: nn.Module, decay: float | None, *, ensemble: bool = False):
        super().__init__()
        # In float32, because timm's rounding for bfloat16 is bound to the device that the model is on by now.
        self.average = ModelEmaV3(model, DECAY if decay is None else decay, dtype=torch.float32)
        self.average.requires_grad_(False)
        self.average.module.config.early_exit = False
        self.ensemble = ensemble

    def train(self, mode: bool = True):
        """Stay in eval mode."""
        return super().train(False)

    def start(self, model: nn.Module) -> None:
        """Start from the weights of the model. Raises ValueError as :meth:`follow`."""
        _check_complete(model)
        self.average.set(inference_modules(model))

    def follow(self, model: nn.Module) -> None:
        """Follow the weights of the model by one step.

        Raises:
            ValueError: If they are sharded.
        """
        _check_complete(model)
        self.average.update(inference_modules(model))

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, Tensor]:
        """Return ``teacher_logits`` ``(batch, classes)`` and ``teacher_features`` ``(batch, width)``."""
        averaged = self.average.module(pixel_values.float())
        logits = averaged.ensemble_logits if self.ensemble else averaged.exit_logits[-1]
        return {"teacher_logits": logits, "teacher_features": averaged.exit_features[-1]}


def _check_complete(model: nn.Module) -> None:
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            "An averaged teacher needs complete weights on every process, but they are sharded (FSDP). Train with "
            "another teacher, or without FSDP."
        )


def inference_modules(model: nn.Module) -> nn.ModuleDict:
    """Return the parts of a multi-exit model that are not the scaffold, under their names."""
    return nn.ModuleDict({name: child for name, child in model.named_children() if name != "scaffold"})


def averaged_teachers(scaffold: nn.Module | None) -> Iterator[AveragedTeacher]:
    """Iterate over the averaged teachers in a scaffold."""
    if scaffold is not None:
        yield from (module for module in scaffold.modules() if isinstance(module, AveragedTeacher))


def check_teacher_decay(owner: str, teacher: nn.Module | str | None, decay: float | None) -> None:
    """Raise ValueError unless ``decay`` is ``None``, or in [0, 1) and of an averaged teacher."""
    if decay is None:
        return
    if teacher not in [FINAL, ENSEMBLE]:
        raise ValueError(
            f"{owner} takes teacher_decay with teacher='{FINAL}' only, but got teacher_decay={decay!r} with another "
            "teacher. Leave it at None."
        )
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
        raise ValueError(f"{owner} needs 0 <= teacher_decay < 1, but got teacher_decay={decay!r}.")
