"""A Trainer whose checkpoints are whole or absent, and hold all that an exact continuation needs."""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..methods import Method
from ..models.checkpoints import shorten
from .averaging import WeightAverage
from .checkpoints import (
    AVERAGE_NAME,
    INCOMPLETE_NAME,
    SCAFFOLD_NAME,
    check_complete,
    check_method,
    load_scaffold,
    load_state,
    publish,
    save_method,
    save_state,
)
from .distributed import average_batch_norm, gather_state, is_sharded


class ResumableTrainer(Trainer):
    """The part of the trainer that saves and resumes, bit for bit on the same machine.

    A checkpoint is written beside the others, in a folder that no one takes for a checkpoint, and gets its name when
    all processes are done. Beside what ``Trainer`` saves it holds the scaffold, the averaged weights, the method's
    name, a list of its files, and the sums of what the next log entry reports.
    """

    method: Method
    average: WeightAverage | None = None
    _saving = False

    def __init__(self, *args, **kwargs):
        self._terms: dict[str, Tensor | float] = defaultdict(lambda: 0.0)
        self._term_steps = 0.0
        super().__init__(*args, **kwargs)

    # Saving

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, INCOMPLETE_NAME) if self._saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        folder, name = self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        # What is saved has statistics that agree; training goes on with each process's own, saved or not.
        self._own_statistics = {key: buffer.clone() for key, buffer in self._statistics()}
        self._synchronise_batch_norm()
        self._check_finite()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._name_checkpoint(folder, name)
            self.accelerator.wait_for_everyone()
        except OSError as error:
            raise OSError(_not_written(folder, name, error)) from error
        except Exception as error:  # safetensors and torch have errors of their own for a full disk
            raise RuntimeError(_not_written(folder, name, error)) from error
        finally:
            self._saving = False
            for key, buffer in self._statistics():
                buffer.copy_(self._own_statistics[key])
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(folder, name))

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        """Go through the statistics of batch norm, in which processes differ."""
        modules = {"model": self.model} | ({"average": self.average.ema.module} if self.average is not None else {})
        for kind, module in modules.items():
            for name, buffer in module.named_buffers():
                if "running_" in name and self.args.world_size > 1:
                    yield f"{kind}/{name}", buffer

    def _name_checkpoint(self, folder: str, name: str) -> None:
        """Give the checkpoint its name, and delete those that are too many."""
        best = self.state.best_model_checkpoint
        if best == os.path.join(folder, INCOMPLETE_NAME, name):
            best = self.state.best_model_checkpoint = os.path.join(folder, name)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(folder, INCOMPLETE_NAME, name, "trainer_state.json"))
            publish(folder, name, self.args.save_total_limit, best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # else it has not got its name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; into a checkpoint also what only trains, the averaged weights and the method's name."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call or output_dir is None:
            return
        scaffold = None if self.model.scaffold is None else gather_state(self.model.scaffold)
        if self.args.should_save:  # called by _save_checkpoint, on all processes
            save_method(output_dir, self.method.name)
            if scaffold is not None:
                save_state(scaffold, output_dir, SCAFFOLD_NAME)
            if self.average is not None:
                save_state(self.average.state_dict(), output_dir, AVERAGE_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save what each process has of its own: random states, statistics, and sums since the last log entry."""
        super()._save_rng_state(output_dir)
        own = {
            "steps": torch.tensor(self._term_steps, dtype=torch.float64),
            "last_logged": torch.tensor(self._globalstep_last_logged),
            "loss": self._tr_loss,
            "mean_loss": self.accelerator.gather(self._tr_loss).mean(),
        }
        own |= {f"term/{name}": torch.as_tensor(term) for name, term in self._terms.items()}
        save_state(own | self._own_statistics, output_dir, self._own_name())

    def _own_name(self) -> str:
        return f"process_{self.args.process_index}.safetensors"

    def _synchronise_batch_norm(self) -> None:
        if self.is_in_train:
            average_batch_norm(self.model)
            if self.average is not None:
                average_batch_norm(self.average.ema.module)

    def _check_finite(self) -> None:
        """Raise FloatingPointError rather than replace a checkpoint by weights that are lost."""
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()  # each process looks at its own shard
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(
                    f"No checkpoint was written at step {self.state.global_step}: {name} holds values that are not "
                    "finite. Go on from an earlier checkpoint with a lower learning rate."
                )

    # Resuming

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        # Of a run that was over in the middle of an epoch the stock loop would take one more step.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_complete(resume_from_checkpoint)
        check_method(resume_from_checkpoint, self.method.name)
        self.model.check_exits(resume_from_checkpoint)
        # What Accelerate saves of a sharded model holds the scaffold, without which it would not load.
        with nullcontext() if is_sharded(self.model) else self._without_scaffold():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.model.scaffold is not None:
            load_scaffold(self.model.scaffold, resume_from_checkpoint)
        if self.average is not None:
            self.average.start = load_state(resume_from_checkpoint, AVERAGE_NAME, "ema_decay")

    def _load_best_model(self) -> None:
        with self._without_scaffold():
            super()._load_best_model()
        if self.average is not None:
            self.average.final = load_state(self.state.best_model_checkpoint, AVERAGE_NAME, "ema_decay")

    @contextmanager
    def _without_scaffold(self) -> Iterator[None]:
        """Take the scaffold off while the weights are loaded: it is not in their file."""
        scaffold, self.model.scaffold = self.model.scaffold, None
        try:
            yield
        finally:
            self.model.scaffold = scaffold

    def _issue_warnings_after_load(self, load_result) -> None:
        shared = self.model._tied_weights_keys or {}  # saved once, under another name
        missing = [name for name in load_result.missing_keys if name not in shared]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint is one of another network: it lacks {shorten(missing)} and holds "
                f"{shorten(load_result.unexpected_keys)} beside it. Resume with the settings that wrote it."
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load what each process has of its own. Called once, before the first step of a resumed run."""
        super()._load_rng_state(checkpoint)
        path = os.path.join(checkpoint, self._own_name())
        if not os.path.isfile(path):
            return  # written by another trainer, or with fewer processes
        own = load_state(checkpoint, self._own_name(), "state of its own")
        self._term_steps = own["steps"].item()
        self._globalstep_last_logged = int(own["last_logged"])
        self._total_loss_scalar -= own["mean_loss"].item()  # train_loss is the mean over the steps of this call
        self._tr_loss.copy_(own["loss"])
        for name, tensor in own.items():
            if name.startswith("term/"):
                self._terms[name.removeprefix("term/")] = tensor.to(self.args.device)
        for name, buffer in self._statistics():
            if name in own:
                buffer.copy_(own[name])


def _not_written(folder: str, name: str, error: Exception) -> str:
    """Remove what was written of a checkpoint, and say what to do."""
    shutil.rmtree(os.path.join(folder, INCOMPLETE_NAME), ignore_errors=True)
    return (
        f"{name} could not be written to {folder}: {error}. Earlier checkpoints are as they were; beside them there "
        "must be room for one more. Free some, then resume from the last."
    )
