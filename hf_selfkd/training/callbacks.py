"""Callbacks of every run: scaffold and data, a moving average of the weights, and records for the model card."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from ..methods.averaged_teacher import inference_modules
from ..methods.base import multi_exit_model
from ..model_card.facts import Evaluation
from .batches import Batches
from .checkpoints import load_average, remove_incomplete
from .distributed import broadcast_buffers, is_sharded, unsharded
from .resume import synchronise_batch_norm
from .seeded_data import SeededDataset


class PrepareScaffold(TrainerCallback):
    """Clean up after a run that was cut off, prepare and update the scaffold, and end with equal processes."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Make buffers equal, and prepare the scaffold of a fresh run."""
        if args.should_save:
            remove_incomplete(args.output_dir)
        network = self.trainer.network
        broadcast_buffers(network)
        if state.global_step == 0:
            network.eval()
            batches = Batches(self.trainer, kwargs["train_dataloader"])
            with torch.no_grad(), unsharded(network, batches):
                self.trainer.method.prepare(network, batches)

    def on_step_end(self, args, state, control, **kwargs):
        """Update the scaffold."""
        self.trainer.method.after_step(self.trainer.network)

    def on_train_end(self, args, state, control, **kwargs):
        """Make the models of all processes equal."""
        synchronise_batch_norm(self.trainer)


class SeedData(TrainerCallback):
    """Keep the epoch and the micro-batch, on which random states depend.

    Attributes:
        epoch: Shared with the training data and its workers; ``None`` if the data has none.
        micro_step: Index of the micro-batch within the current step, which accumulates gradients.
    """

    def __init__(self):
        self.epoch: Tensor | None = None
        self.micro_step = 0

    def follow(self, data: Any) -> None:
        """Follow the training data, if it is a :class:`~hf_selfkd.training.SeededDataset`."""
        self.epoch = data.epoch if isinstance(data, SeededDataset) else None

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Set the epoch; ``set_epoch`` of Accelerate's loaders does not reach the data on several processes."""
        if self.epoch is not None:
            self.epoch.fill_(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        """Count the micro-batches of a step from 0."""
        self.micro_step = 0


class SaveAfterEpoch(TrainerCallback):
    """Save the last step of an epoch after the logging and evaluation at the end of the epoch.

    A resumed run does not come to the end of that epoch again, so it would lose both.
    """

    def __init__(self):
        self.is_due = False

    def on_step_end(self, args, state, control, **kwargs):
        """Postpone the checkpoint of the last step."""
        self.is_due = control.should_save and ends_epoch(state)
        control.should_save = control.should_save and not self.is_due

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save it now."""
        control.should_save = control.should_save or self.is_due


def ends_epoch(state: TrainerState) -> bool:
    """Whether a step was the last one of its epoch, or of the run."""
    return float(state.epoch).is_integer() or state.global_step >= state.max_steps


class EmaWeights(TrainerCallback):
    """Exponential moving average of the inference weights, by timm's ``ModelEmaV3``.

    Checkpoints hold both: the trained weights as the model's, the averaged ones next to them.

    Args:
        decay: Share of the average that remains at each step, in [0, 1).
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), but got {decay!r}.")
        self.decay = decay
        self.start: dict[str, Tensor] | None = None

    @property
    def module(self) -> nn.Module:
        """The averaged weights as a module, from the beginning of training."""
        return self.ema.module

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights under the names of the model's."""
        return self.module.state_dict()

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Start from the weights as they are, or from the averaged weights of a checkpoint.

        Raises:
            ValueError: If the weights are sharded.
        """
        if is_sharded(model):
            raise ValueError(
                "ema_decay needs complete weights on every process, but they are sharded (FSDP). Train without "
                "ema_decay, or without FSDP."
            )
        self.ema = ModelEmaV3(inference_modules(multi_exit_model(model)), decay=self.decay)
        if self.start is not None:
            self.module.load_state_dict(self.start)
            self.start = None

    def on_step_end(self, args, state, control, model, **kwargs):
        """Follow the weights by one step."""
        self.ema.update(inference_modules(multi_exit_model(model)))

    def on_train_end(self, args, state, control, model, **kwargs):
        """Leave the averaged weights in the model: the last, or those of the best checkpoint."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        multi_exit_model(model).load_state_dict(load_average(best) if best else self.state_dict(), strict=False)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Swap the averaged weights in, and the trained ones back afterwards."""
        network = multi_exit_model(model)
        trained = {name: tensor.clone() for name, tensor in inference_modules(network).state_dict().items()}
        network.load_state_dict(self.state_dict(), strict=False)
        try:
            yield
        finally:
            network.load_state_dict(trained, strict=False)


class CardRecorder(TrainerCallback):
    """Records for the model card: the last evaluation, and the exit policy that the model had before training."""

    def __init__(self):
        self.policy_before_training: dict[str, Any] | None = None
        self._evaluation: Evaluation | None = None
        self._is_current = False

    @property
    def evaluation(self) -> Evaluation | None:
        """The last evaluation; ``None`` if it is one of earlier weights."""
        return self._evaluation if self._is_current else None

    def record(self, evaluation: Evaluation) -> None:
        """Record an evaluation of the current weights; not one of ``predict``, or of one dataset among several."""
        if "eval_loss" in evaluation.metrics:
            self._evaluation, self._is_current = evaluation, True

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Forget the evaluation of the weights before training."""
        self._evaluation, self._is_current = None, False
        self.policy_before_training = multi_exit_model(model).config.exit_policy

    def on_step_end(self, args, state, control, **kwargs):
        """Mark the last evaluation as one of earlier weights."""
        self._is_current = False

    def on_train_end(self, args, state, control, **kwargs):
        """Take the evaluation of the best checkpoint, which the model now holds, from the log."""
        if self._evaluation is None or not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        best = [entry for entry in state.log_history if entry.get("step") == state.best_global_step]
        metrics = {name: value for entry in best for name, value in entry.items() if name.startswith("eval_")}
        self.record(self._evaluation._replace(step=state.global_step, metrics=metrics))
