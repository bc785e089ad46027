"""What happens before the first step of a run, and around every step, epoch and run."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from .checkpoints import remove_incomplete
from .distributed import broadcast_buffers, unsharded


class Batches:
    """Batches of a data loader, on the trainer's device; each loop over them starts anew.

    Without the samples that Accelerate repeats at the end so that all processes have as many.
    """

    def __init__(self, trainer: Trainer, dataloader):
        self.trainer = trainer
        self.dataloader = dataloader

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        loader = self.trainer.accelerator.gradient_state
        for batch in self.dataloader:
            batch = self.trainer._prepare_inputs(batch)
            size = len(batch["pixel_values"])
            if loader.end_of_dataloader and loader.remainder > 0:
                size = min(size, max(0, loader.remainder - size * self.trainer.args.process_index))
            if size:
                yield {name: values[:size] for name, values in batch.items()}


class Preparation(TrainerCallback):
    """Clears up behind a run that was cut off, prepares the scaffold of a fresh run, tells the data its epoch."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Make buffers equal, and let the method prepare the scaffold of a fresh run."""
        if args.should_save:
            remove_incomplete(args.output_dir)
        model = self.trainer.model
        broadcast_buffers(model)
        if state.global_step == 0:
            model.eval()
            batches = Batches(self.trainer, kwargs["train_dataloader"])
            with torch.no_grad(), unsharded(model, batches):
                self.trainer.method.prepare(model, batches)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Tell the data its epoch."""
        if hasattr(self.trainer, "_seeded_dataset"):
            self.trainer._seeded_dataset.epoch.fill_(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        """Count the batches of a step from 0."""
        self.trainer._micro_step = 0

    def on_train_end(self, args, state, control, **kwargs):
        """Leave all processes with the same model."""
        self.trainer._synchronise_batch_norm()
