"""Sums of the loss and its terms since the last log entry.

Trainer keeps those of the loss in private fields. Only this module touches them, and `versions` one that not all
versions have; a test pins them.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .versions import exclude_step_from_train_loss

# Fields of Trainer, and their use in this module. They exist from the beginning of training.
PRIVATE_FIELDS = {
    "_tr_loss": "the loss since the last log entry, on this process: saved, restored, and reset for a skipped step",
    "_globalstep_last_logged": "the step of that entry: saved, restored, and moved on by a skipped step",
    "_total_loss_scalar": "the loss in earlier log entries of this call, for train_loss: corrected when resuming",
}


class LossSums:
    """Sums over the steps since the last log entry, on this process.

    Args:
        trainer: The trainer whose loss is summed.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._terms: dict[str, Tensor | float] = defaultdict(lambda: 0.0)
        self._steps = 0.0

    def add(self, terms: dict[str, Tensor], share: float) -> None:
        """Add the terms of a micro-batch.

        Args:
            terms: Scalars.
            share: Share of the step that the micro-batch is, in (0, 1].
        """
        self._steps += share
        for name, term in terms.items():
            self._terms[name] = self._terms[name] + share * term.detach()

    def reset(self) -> None:
        """Start again."""
        self._terms.clear()
        self._steps = 0.0

    def pop_means(self) -> dict[str, float]:
        """Return the mean of every term over steps and processes, and start again. Every process must call this."""
        gather, device = self._trainer.accelerator.gather, self._trainer.args.device
        means = {
            name: gather(value.to(device).float()).mean().item() / self._steps for name, value in self._terms.items()
        }
        self.reset()
        return means

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the sums, for :meth:`skip_step`."""
        return {"loss": self._trainer._tr_loss.clone(), "terms": dict(self._terms), "steps": self._steps}

    def skip_step(self, before: dict[str, Any]) -> None:
        """Exclude the current step from all means: that of the next log entry, and that of the complete run.

        Args:
            before: The snapshot at the beginning of the step.
        """
        self._trainer._tr_loss.copy_(before["loss"])
        self._trainer._globalstep_last_logged += 1
        exclude_step_from_train_loss(self._trainer)
        self._terms.clear()
        self._terms.update(before["terms"])
        self._steps = before["steps"]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums as tensors. Every process must call this."""
        loss = self._trainer._tr_loss
        state = {
            "steps": torch.tensor(self._steps, dtype=torch.float64),
            "last_logged": torch.tensor(self._trainer._globalstep_last_logged),
            "loss": loss,
            "mean_loss": self._trainer.accelerator.gather(loss).mean(),
        }
        return state | {f"term/{name}": torch.as_tensor(term) for name, term in self._terms.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from sums that were saved; ``train_loss`` remains the mean over the steps of this call."""
        trainer = self._trainer
        self._steps = state["steps"].item()
        trainer._globalstep_last_logged = int(state["last_logged"])
        trainer._total_loss_scalar -= state["mean_loss"].item()
        trainer._tr_loss.copy_(state["loss"])
        for name, tensor in state.items():
            if name.startswith("term/"):
                self._terms[name.removeprefix("term/")] = tensor.to(trainer.args.device)
