"""Stop a run, or skip a step, when a number is not finite, before the weights change."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .distributed import on_any_process

logger = logging.get_logger(__name__)


class NonFiniteGuard(TrainerCallback):
    """Take no step of the optimizer where the loss, one of its terms or the gradient is not finite on any process.

    All numbers are read from the device at once, the only time that a step waits for it; several processes reduce one
    number per step.

    Args:
        trainer: The trainer whose steps to check.
        max_skipped_batches: Number of steps that may be skipped for their numbers, 0 or more; they do not change the
            weights, the statistics of batch norm or the state of the optimizer.

    Raises:
        ValueError: If ``max_skipped_batches`` is negative or not an integer.
    """

    def __init__(self, trainer: Trainer, max_skipped_batches: int):
        if type(max_skipped_batches) is not int or max_skipped_batches < 0:
            raise ValueError(f"max_skipped_batches must be an integer of at least 0, but got {max_skipped_batches!r}.")
        self.trainer = trainer
        self.max_skipped_batches = max_skipped_batches
        self.skipped = 0
        self._grad_norm = torch.zeros(())
        self._batches: list[tuple[dict[str, Tensor], Tensor | None]] = []
        self._before: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Continue to count where a resumed run stopped."""
        counts = [entry["skipped_batches"] for entry in state.log_history if "skipped_batches" in entry]
        self.skipped = counts[-1] if counts else 0

    def on_step_begin(self, args, state, control, model, **kwargs):
        """Copy the state that the forward passes of a step change, if it may have to be restored."""
        self._batches.clear()
        if self.max_skipped_batches:
            buffers = [buffer.clone() for buffer in model.buffers()]
            self._before = {"buffers": buffers, "sums": self.trainer.sums.snapshot()}

    def observe(self, terms: dict[str, Tensor], indices: Tensor | None) -> None:
        """Note the terms of a micro-batch, and the samples in it."""
        self._batches.append(({name: term.detach() for name, term in terms.items()}, indices))

    def observe_gradient(self, model: torch.nn.Module) -> None:
        """Note the norm of a step's gradient, before clipping: a norm that overflows is clipped to a gradient of 0."""
        if self.trainer.accelerator.scaler is None:  # else a gradient that overflows is a search for the scale
            self._grad_norm = _local_grad_norm(model).to(self.trainer.args.device).float()

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        """Stop, or skip the step, if a number is not finite."""
        terms = [term.float() for terms, _ in self._batches for term in terms.values()]
        numbers = torch.stack([*terms, self._grad_norm.to(args.device)])
        if not on_any_process(~numbers.isfinite().all(), args.device):
            return
        reports = gather_object(self._describe_terms()) or gather_object(self._describe_gradient())
        report = (
            f"{'; '.join(reports)}; at step {state.global_step + 1} with a learning rate of "
            f"{optimizer.param_groups[0]['lr']:g}"
        )
        if self.skipped >= self.max_skipped_batches:
            raise FloatingPointError(
                f"{report}. The weights are those after step {state.global_step} and no checkpoint was replaced. "
                "Look at these samples, lower the learning rate, or skip such batches with max_skipped_batches "
                f"({self.skipped} skipped)."
            )
        self._skip(report, model)

    def _skip(self, report: str, model: torch.nn.Module) -> None:
        model.zero_grad()  # without a gradient the optimizer changes neither the weights nor its own state
        for buffer, before in zip(model.buffers(), self._before["buffers"], strict=True):
            buffer.copy_(before)
        self.trainer.sums.skip_step(self._before["sums"])
        self.skipped += 1
        logger.warning(f"Skipped: {report}. {self.skipped} of {self.max_skipped_batches} batches.")
        self.trainer.log({"skipped_batches": self.skipped})

    def _describe_terms(self) -> list[str]:
        """Report the terms of this process that are not finite, and the samples they are of."""
        reports = []
        for terms, indices in self._batches:
            bad = [f"{name} is {term.item()}" for name, term in terms.items() if not term.isfinite()]
            if bad:
                reports.append(f"{self._process()}{', '.join(bad)}{_samples(indices)}")
        return reports

    def _describe_gradient(self) -> list[str]:
        """Report the gradient of this process: a bad term of one process spoils that of all."""
        if self._grad_norm.isfinite():
            return []  # of shards, those of another process
        samples = [indices for _, indices in self._batches if indices is not None]
        named = _samples(torch.cat(samples) if samples else None)
        return [f"{self._process()}grad_norm is {self._grad_norm.item()}{named}"]

    def _process(self) -> str:
        args = self.trainer.args
        return f"process {args.process_index}: " if args.world_size > 1 else ""


def _local_grad_norm(model: torch.nn.Module) -> Tensor:
    """Return the norm of the gradients, or of the shards of them that this process holds."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return torch.nn.utils.get_total_norm(shards)


def _samples(indices: Tensor | None) -> str:
    return "" if indices is None else f" for the samples {', '.join(map(str, indices.tolist()))}"
