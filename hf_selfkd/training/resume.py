"""State that an exact resume needs in addition to transformers' own checkpoint, and checks before it begins.

A checkpoint also holds the scaffold, the averaged weights and the method's name; and of every process, in
``process_<i>.safetensors``, its statistics of batch norm and the sums that the next log entry reports.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from accelerate.utils import is_compiled_module
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..models.checkpoint_files import shorten
from .checkpoints import (
    AVERAGE_NAME,
    SCAFFOLD_NAME,
    check_complete,
    check_method,
    commit_checkpoint,
    load_average,
    load_scaffold,
    load_state,
    save_method,
    save_state,
    written_aside,
)
from .distributed import average_batch_norm, gather_state, is_sharded
from .settings import swapped


class RestoreProcess(TrainerCallback):
    """Give each process of a resumed run its own statistics and sums, before its first step.

    Not earlier: an evaluation before the first step replaces the statistics by their mean.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.checkpoint: str | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Load them, once."""
        if self.checkpoint is not None:
            load_process(self.trainer, self.checkpoint)
            self.checkpoint = None


def load_process(trainer: Trainer, checkpoint: str) -> None:
    """Load the statistics and sums of this process, if the checkpoint has any."""
    name = process_file(trainer)
    if not os.path.isfile(os.path.join(checkpoint, name)):
        return  # written by another trainer, or with fewer processes
    saved = load_state(checkpoint, name, "state of its own")
    trainer.sums.load_state_dict(saved)
    for key, buffer in process_statistics(trainer):
        if key in saved:
            buffer.copy_(saved[key])


def process_file(trainer: Trainer) -> str:
    """Return the name of the file with the state of this process."""
    return f"process_{trainer.args.process_index}.safetensors"


def process_statistics(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Yield the statistics of batch norm in which processes differ, with their names in the checkpoint."""
    modules = {"model": trainer.network} | ({"average": trainer.average.module} if trainer.average else {})
    for kind, module in modules.items():
        for name, buffer in module.named_buffers():
            if "running_" in name and trainer.args.world_size > 1:
                yield f"{kind}/{name}", buffer


def synchronise_batch_norm(trainer: Trainer) -> None:
    """Average the batch-norm statistics of all processes, in the weights and the averaged weights."""
    average_batch_norm(trainer.network)
    if trainer.average is not None:
        average_batch_norm(trainer.average.module)


@contextmanager
def synchronised_for_saving(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    """Save equal statistics; training then continues with those of each process, which are yielded."""
    own = {key: buffer.clone() for key, buffer in process_statistics(trainer)}
    synchronise_batch_norm(trainer)
    try:
        yield own
    finally:
        for key, buffer in process_statistics(trainer):
            buffer.copy_(own[key])


@contextmanager
def saved_completely(trainer: Trainer, run_folder: str) -> Iterator[None]:
    """Write a checkpoint aside, with the files of this library, and give it its name once it is complete.

    Args:
        trainer: Writes into ``trainer.aside`` meanwhile.
        run_folder: Folder of the run, which holds its checkpoints.
    """
    args, state, name = trainer.args, trainer.state, f"checkpoint-{trainer.state.global_step}"
    with synchronised_for_saving(trainer) as statistics:
        check_finite(trainer.model, state.global_step)
        with written_aside(run_folder, name) as aside, swapped(trainer, aside=aside):
            yield
            written, final = os.path.join(aside, name), os.path.join(run_folder, name)
            save_extras(trainer, written, statistics)
            trainer.accelerator.wait_for_everyone()
            if state.best_model_checkpoint == written:
                state.best_model_checkpoint = final
            if args.should_save:
                state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
                commit_checkpoint(run_folder, name, args.save_total_limit, state.best_model_checkpoint)
            trainer.accelerator.wait_for_everyone()


def save_extras(trainer: Trainer, folder: str, statistics: dict[str, Tensor]) -> None:
    """Write the files of this library into a checkpoint. Every process must call this.

    Args:
        trainer: The trainer.
        folder: Folder of the checkpoint.
        statistics: Statistics of batch norm of this process.
    """
    scaffold = trainer.network.scaffold
    scaffold = None if scaffold is None else gather_state(scaffold)
    if trainer.args.should_save:
        save_method(folder, trainer.method.name)
        if scaffold is not None:
            save_state(scaffold, folder, SCAFFOLD_NAME)
        if trainer.average is not None:
            save_state(trainer.average.state_dict(), folder, AVERAGE_NAME)
    if not trainer.args.save_only_model:
        save_state(trainer.sums.state_dict() | statistics, folder, process_file(trainer))


def check_finite(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError if weights are not finite: no checkpoint is replaced by them."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()  # each process checks its shard
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FloatingPointError(
                f"No checkpoint was written at step {step}: {name} holds values that are not finite. Resume from an "
                "earlier checkpoint with a lower learning rate."
            )


def check_checkpoint(folder: str, network: nn.Module, method: str) -> None:
    """Raise ValueError unless a checkpoint is complete, of this method and of this network, before it is loaded.

    Args:
        folder: Folder of the checkpoint.
        network: A multi-exit model.
        method: Name of the method that is trained with.
    """
    check_complete(folder)
    check_method(folder, method)
    if os.path.isfile(os.path.join(folder, CONFIG_NAME)):  # adapters are saved without one
        network.check_exits(folder)
    saved = _saved_weights(folder)
    if saved is None:
        return
    shared = network._tied_weights_keys or {}  # saved once, under another name
    expected = [name for name in network.state_dict() if not name.startswith("scaffold.")]
    missing = [name for name in expected if name not in saved and name not in shared]
    unexpected = sorted(saved - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint is one of another network: it lacks {shorten(missing)} and has {shorten(unexpected)} "
            "in addition. Resume with the settings that wrote it."
        )


def _saved_weights(folder: str) -> set[str] | None:
    """Return the names of the weights in a checkpoint, ``None`` if it has no safetensors of the model."""
    path = os.path.join(folder, SAFE_WEIGHTS_NAME)
    if os.path.isfile(path):
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    path = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    if os.path.isfile(path):
        with open(path) as file:
            return set(json.load(file)["weight_map"])
    return None


@contextmanager
def uncompiled(trainer: Trainer) -> Iterator[None]:
    """Set the trainer's model to the one inside a compiled one: for the names of weights, and of its arguments."""
    inside = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    with swapped(trainer, model=inside) if is_compiled_module(trainer.model) else nullcontext():
        yield


@contextmanager
def inference_weights(trainer: Trainer) -> Iterator[None]:
    """Detach the scaffold while weights are loaded or saved: it is not in their file, unless they are sharded."""
    network = trainer.network
    with uncompiled(trainer), nullcontext() if is_sharded(network) else swapped(network, scaffold=None):
        yield


def load_extras(trainer: Trainer, checkpoint: str) -> None:
    """Load the scaffold, and keep the averaged weights until training begins.

    Raises:
        ValueError: If the checkpoint has none, or the scaffold of another network.
    """
    if trainer.network.scaffold is not None:
        load_scaffold(trainer.network.scaffold, checkpoint)
    if trainer.average is not None:
        trainer.average.start = load_average(checkpoint)
