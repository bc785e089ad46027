"""Checkpoint folders: complete or absent, whatever stops the run, and the files added to transformers' own."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from .distributed import load_gathered_state

SCAFFOLD_NAME = "scaffold.safetensors"
AVERAGE_NAME = "ema.safetensors"
METHOD_NAME = "method.json"
MANIFEST_NAME = "files.json"
# Checkpoints are written and deleted in this folder: get_last_checkpoint never takes the name, the Hub never gets it.
INCOMPLETE_NAME = "_incomplete"

logger = logging.get_logger(__name__)


# Files of a checkpoint


def save_state(state: dict[str, Tensor], folder: str, name: str) -> None:
    """Write tensors to a file of the checkpoint."""
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, os.path.join(folder, name), metadata={"format": "pt"})


def load_state(folder: str, name: str, part: str) -> dict[str, Tensor]:
    """Read tensors from a file of the checkpoint.

    Raises:
        ValueError: If there is no such file, because the run that wrote the checkpoint had no such part.
    """
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise ValueError(
            f"The checkpoint has no {name}: the run that wrote it had no {part}. Resume with the settings that wrote "
            "it, or start a new run from its weights with from_pretrained."
        )
    return load_file(path)


def save_method(folder: str, method: str) -> None:
    """Record the name of the method that wrote the checkpoint."""
    with open(os.path.join(folder, METHOD_NAME), "w") as file:
        json.dump({"name": method}, file)


def check_method(folder: str, method: str) -> None:
    """Raise ValueError if another method wrote the checkpoint."""
    path = os.path.join(folder, METHOD_NAME)
    if not os.path.isfile(path):
        return  # written by another trainer
    with open(path) as file:
        wrote = json.load(file)["name"]
    if wrote != method:
        raise ValueError(
            f"The checkpoint was written by method '{wrote}', but this run trains with '{method}'. Resume with the "
            "settings that wrote it, or start a new run from its weights with from_pretrained."
        )


def load_scaffold(scaffold: nn.Module, folder: str) -> None:
    """Load the modules used only in training.

    Raises:
        ValueError: If the checkpoint has none, or those of another network.
    """
    state = load_state(folder, SCAFFOLD_NAME, "scaffold")
    if differing := state.keys() ^ scaffold.state_dict().keys():
        raise ValueError(
            f"{SCAFFOLD_NAME} was written by another method or another network: it differs in "
            f"{sorted(differing)[:3]} ({len(differing)} names in all). Resume with the settings that wrote it."
        )
    load_gathered_state(scaffold, state, strict=False)  # a frozen teacher is not in the file


def load_average(folder: str) -> dict[str, Tensor]:
    """Read the averaged weights.

    Raises:
        ValueError: If the checkpoint has none.
    """
    return load_state(folder, AVERAGE_NAME, "ema_decay")


# Writing


@contextmanager
def written_aside(run_folder: str, name: str) -> Iterator[str]:
    """Yield the folder to write a checkpoint in, under its name, before :func:`commit_checkpoint`.

    Raises:
        OSError: If writing failed; the partial checkpoint is removed, and earlier checkpoints are unchanged.
        RuntimeError: The same, for the errors that safetensors and torch raise when a disk is full.
    """
    aside = os.path.join(run_folder, INCOMPLETE_NAME)
    try:
        yield aside
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise (OSError if isinstance(error, OSError) else RuntimeError)(
            f"{name} could not be written to {run_folder}: {error}. Earlier checkpoints are unchanged; there must be "
            "room for one more beside them. Free some space, then resume from the last one."
        ) from error


def commit_checkpoint(run_folder: str, name: str, limit: int | None, best: str | None) -> None:
    """Give a checkpoint that was written aside its name, and delete the oldest ones above ``limit``.

    Whenever the process is killed, no incomplete checkpoint has a checkpoint's name. Neither the newest nor the
    best is deleted.

    Args:
        run_folder: Folder of the run, which holds its checkpoints.
        name: Name of the checkpoint.
        limit: Number of checkpoints to keep; ``None`` for all.
        best: Path of the best checkpoint, if there is one.
    """
    incomplete = os.path.join(run_folder, INCOMPLETE_NAME)
    written, final = os.path.join(incomplete, name), os.path.join(run_folder, name)
    _write_manifest(Path(written))
    if os.path.isdir(final):
        _set_aside(final)
    os.rename(written, final)
    checkpoints = sort_checkpoints(run_folder, use_mtime=True)
    kept = {os.path.abspath(path) for path in (checkpoints[-1], best) if path is not None}
    surplus = len(checkpoints) - max(limit or len(checkpoints), len(kept))
    older = [path for path in checkpoints if os.path.abspath(path) not in kept]
    for checkpoint in older[: max(0, surplus)]:
        _set_aside(checkpoint)
    shutil.rmtree(incomplete)


def _write_manifest(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = folder / MANIFEST_NAME
    manifest.write_text(json.dumps(sizes, indent=1))
    for path in [*files, manifest]:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())  # so that the name stands for complete data after a power loss too


def _set_aside(checkpoint: str) -> None:
    """Move a checkpoint before deleting it, so that a kill leaves no partial checkpoint under its name."""
    folder, name = os.path.split(checkpoint)
    os.rename(checkpoint, os.path.join(folder, INCOMPLETE_NAME, f"deleted-{name}"))


def remove_incomplete(run_folder: str) -> None:
    """Remove the remains of a checkpoint that was being written or deleted when a run was stopped."""
    folder = os.path.join(run_folder, INCOMPLETE_NAME)
    if not os.path.isdir(folder):
        return
    if names := sorted(os.listdir(folder)):
        logger.warning(f"Removing {', '.join(names)} from {folder}: cut off while being written or deleted.")
    shutil.rmtree(folder)


# Reading


def check_complete(folder: str) -> None:
    """Check that a checkpoint holds everything that was written into it.

    Raises:
        ValueError: If a file is missing or has another size; the error has its name.
    """
    path = os.path.join(folder, MANIFEST_NAME)
    if not os.path.isfile(path):
        return  # written by another trainer
    with open(path) as file:
        sizes = json.load(file)
    for name, size in sizes.items():
        path = os.path.join(folder, name)
        found = os.path.getsize(path) if os.path.isfile(path) else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise ValueError(
                f"The checkpoint {folder} is damaged: {name} {state}. Copy it again, or resume from an earlier one."
            )


def find_last_checkpoint(run_folder: str) -> str | None:
    """Return the newest complete checkpoint, ``None`` if there is none; damaged ones are logged and skipped."""
    for checkpoint in reversed(sort_checkpoints(run_folder)):
        try:
            check_complete(checkpoint)
        except ValueError as error:
            logger.warning(f"Skipped: {error}")
        else:
            return checkpoint
    return None
