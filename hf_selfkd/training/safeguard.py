"""What stops a run in order: numbers that go bad, and SIGTERM."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a shell reports of a process that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM


class Safeguard(TrainerCallback):
    """Lets all processes agree, before each step of the optimizer, whether to take it and whether to go on after it.

    A step is not taken where the loss, one of its terms or the norm of the gradient is not finite on any process. All
    of them are read from the device at once, which is the only time that a step waits for it; several processes reduce
    two numbers per step.

    After SIGTERM the run saves a checkpoint at the end of the step, and of the evaluation if it is in one, and ends.
    The last step of an epoch is saved after what the epoch's end logs and evaluates, so that a resumed run loses
    nothing.

    Args:
        trainer: Whose steps to watch.
        max_skipped_batches: Number of steps that may be left out because of their numbers, 0 or more; they do not
            change the weights, the statistics of batch norm or the state of the optimizer.
        saves_on_sigterm: Whether to listen to SIGTERM.

    Raises:
        ValueError: If ``max_skipped_batches`` is no such number.
    """

    def __init__(self, trainer: Trainer, max_skipped_batches: int, saves_on_sigterm: bool):
        if type(max_skipped_batches) is not int or max_skipped_batches < 0:
            raise ValueError(f"max_skipped_batches must be a whole number from 0, but got {max_skipped_batches!r}.")
        self.trainer = trainer
        self.max_skipped_batches = max_skipped_batches
        self.saves_on_sigterm = saves_on_sigterm
        self.terminated = False  # this process got SIGTERM
        self.ends = False  # all processes know
        self._saves_late = False
        self.skipped = 0
        self.grad_norm: Tensor | None = None
        self._batches: list[tuple[dict[str, Tensor], Tensor | None]] = []
        self._kept: dict[str, Any] = {}

    # SIGTERM

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to SIGTERM; once the run has ended because of it, end the process as SIGTERM would have."""
        self.terminated = self.ends = False
        previous = signal.getsignal(signal.SIGTERM)
        is_main = threading.current_thread() is threading.main_thread()  # Python lets no other listen
        if not self.saves_on_sigterm or not is_main or previous in (signal.SIG_IGN, None):  # None: not Python's
            yield
            return
        signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
        if not (self.ends or self.terminated):
            return
        if callable(previous):
            previous(signal.SIGTERM, None)
        else:
            raise SystemExit(TERMINATED)

    def _terminate(self, signum, frame) -> None:
        self.terminated = True

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop, if a process was told to end."""
        if self.ends:
            logger.warning(f"Ending after step {state.global_step} because of SIGTERM. Resume from its checkpoint.")
            control.should_save = control.should_training_stop = True
        # The end of an epoch logs and evaluates, and a resumed run does not come to it again: save after that. After
        # SIGTERM there may be no time for it, so save before too.
        is_last = state.epoch.is_integer() or state.global_step >= state.max_steps
        self._saves_late = control.should_save and is_last
        control.should_save = control.should_save and (self.ends or not is_last)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save what was left for the end of the epoch; of one that is broken off, do nothing more."""
        if self._saves_late:
            control.should_save = True
        elif self.ends:
            control.should_log = control.should_evaluate = control.should_save = False

    # Numbers

    def on_train_begin(self, args, state, control, **kwargs):
        """Go on counting where a resumed run stopped."""
        counts = [entry["skipped_batches"] for entry in state.log_history if "skipped_batches" in entry]
        self.skipped = counts[-1] if counts else 0

    def on_step_begin(self, args, state, control, model, **kwargs):
        """Keep what the forward passes of a step change, where it may have to be undone."""
        self._batches.clear()
        if self.max_skipped_batches:
            trainer = self.trainer
            self._kept = {
                "buffers": [buffer.clone() for buffer in model.buffers()],
                "loss": trainer._tr_loss.clone(),
                "terms": dict(trainer._terms),
                "steps": trainer._term_steps,
            }

    def observe(self, terms: dict[str, Tensor], indices: Tensor | None) -> None:
        """Note what a micro-batch gave, and which samples it held."""
        self._batches.append(({name: term.detach() for name, term in terms.items()}, indices))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Stop, or leave the step out, if a number is not finite."""
        numbers = [term.float() for terms, _ in self._batches for term in terms.values()]
        if self.grad_norm is not None:
            numbers.append(torch.as_tensor(self.grad_norm, device=args.device).float())
        is_bad = ~torch.stack(numbers).isfinite().all()
        if args.world_size > 1:
            flags = torch.stack([is_bad, is_bad.new_tensor(self.terminated)]).float()
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            is_bad, self.ends = map(bool, flags.tolist())
        else:
            self.ends = self.terminated
        if is_bad:
            self._stop_or_skip(state, model)

    def _stop_or_skip(self, state, model) -> None:
        # A term of one process spoils the gradient of all, so that comes last.
        reports = gather_object(self._describe_terms()) or gather_object(self._describe_gradient())
        report = (
            f"{'; '.join(reports)}; at step {state.global_step + 1} with a learning rate of "
            f"{self.trainer._get_learning_rate():g}"
        )
        if self.skipped >= self.max_skipped_batches:
            raise FloatingPointError(
                f"{report}. The weights are those after step {state.global_step} and no checkpoint was replaced. "
                f"Look at these samples, lower the learning rate, or let some batches pass with max_skipped_batches "
                f"({self.skipped} passed)."
            )
        model.zero_grad()  # without a gradient the optimizer leaves weights and its own state alone
        for buffer, kept in zip(model.buffers(), self._kept["buffers"], strict=True):
            buffer.copy_(kept)
        trainer = self.trainer
        trainer._tr_loss.copy_(self._kept["loss"])
        trainer._terms.clear()
        trainer._terms.update(self._kept["terms"])
        trainer._term_steps = self._kept["steps"]
        # Means are over the steps that were taken: those of the next log entry, and of the whole run.
        trainer._globalstep_last_logged += 1
        trainer._initial_global_step += 1
        self.skipped += 1
        logger.warning(f"Left out: {report}. {self.skipped} of {self.max_skipped_batches} batches.")
        trainer.log({"skipped_batches": self.skipped})

    def _describe_terms(self) -> list[str]:
        """Say which terms of this process are not finite, and of which samples."""
        reports = []
        for terms, indices in self._batches:
            bad = [f"{name} is {term.item()}" for name, term in terms.items() if not term.isfinite()]
            if bad:
                reports.append(f"{self._process()}{', '.join(bad)}{_samples(indices)}")
        return reports

    def _describe_gradient(self) -> list[str]:
        samples = [indices for _, indices in self._batches if indices is not None]
        norm = f"grad_norm is {float(self.grad_norm)}"
        return [f"{self._process()}{norm}{_samples(torch.cat(samples) if samples else None)}"]

    def _process(self) -> str:
        args = self.trainer.args
        return f"process {args.process_index}: " if args.world_size > 1 else ""


def _samples(indices: Tensor | None) -> str:
    return "" if indices is None else f" for the samples {', '.join(map(str, indices.tolist()))}"
