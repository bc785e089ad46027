"""What a training checkpoint holds beside the model, and how it becomes whole at once."""

import json
import os
import shutil
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
# Where checkpoints are written and deleted: a name that get_last_checkpoint never takes and the Hub never gets.
INCOMPLETE_NAME = "_incomplete"

logger = logging.get_logger(__name__)


def save_state(state: dict[str, Tensor], folder: str, name: str) -> None:
    """Write tensors to a file of the checkpoint."""
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, os.path.join(folder, name), metadata={"format": "pt"})


def load_state(folder: str, name: str, what: str) -> dict[str, Tensor]:
    """Read tensors from a file of the checkpoint.

    Raises:
        ValueError: If the run that wrote the checkpoint had none.
    """
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise ValueError(
            f"The checkpoint has no {name}: the run that wrote it had no {what}. Resume with the settings that wrote "
            "it, or start a new run from its weights with from_pretrained."
        )
    return load_file(path)


def save_method(folder: str, method: str) -> None:
    """Note which method wrote the checkpoint."""
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
    """Load what only trains.

    Raises:
        ValueError: If the checkpoint has none, or that of another network.
    """
    state = load_state(folder, SCAFFOLD_NAME, "scaffold")
    if differing := state.keys() ^ scaffold.state_dict().keys():
        raise ValueError(
            f"{SCAFFOLD_NAME} was written by another method or another network: it differs in "
            f"{sorted(differing)[:3]} ({len(differing)} names in all). Resume with the settings that wrote it."
        )
    load_gathered_state(scaffold, state, strict=False)  # a frozen teacher is not in the file


def publish(run_folder: str, name: str, limit: int | None, best: str | None) -> None:
    """Give a checkpoint that was written among the incomplete ones its name, and delete the oldest above ``limit``.

    Killed at any moment, this leaves no checkpoint that is not whole. Neither the newest nor the best is deleted.
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
            os.fsync(file.fileno())  # after a loss of power too, a name stands for data that is there


def _set_aside(checkpoint: str) -> None:
    """Take its name from a checkpoint that is to be deleted: killed meanwhile, no half of it keeps the name."""
    folder, name = os.path.split(checkpoint)
    os.rename(checkpoint, os.path.join(folder, INCOMPLETE_NAME, f"deleted-{name}"))


def remove_incomplete(run_folder: str) -> None:
    """Remove what a run left that was stopped while it wrote or deleted a checkpoint."""
    folder = os.path.join(run_folder, INCOMPLETE_NAME)
    if not os.path.isdir(folder):
        return
    if names := sorted(os.listdir(folder)):
        logger.warning(f"Removing {', '.join(names)} from {folder}: cut off while being written or deleted.")
    shutil.rmtree(folder)


def check_complete(folder: str) -> None:
    """Check that a checkpoint holds all that was written into it.

    Raises:
        ValueError: If a file is missing or has another size; names it.
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
    """Return the newest checkpoint that is whole, ``None`` if there is none; what is passed over is logged."""
    for checkpoint in reversed(sort_checkpoints(run_folder)):
        try:
            check_complete(checkpoint)
        except ValueError as error:
            logger.warning(f"Passed over: {error}")
        else:
            return checkpoint
    return None
