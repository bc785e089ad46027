"""To the Hub and back: uploads that say why they failed, and weights from safetensors only."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

# What of the arguments of from_pretrained says where a file is.
_LOCATION = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


@contextmanager
def explained_upload(repo_id: str, kept: str) -> Iterator[None]:
    """Turn whatever breaks an upload into an OSError that names the reason, what is kept and what to do.

    Args:
        repo_id: Where the upload goes.
        kept: What is not lost.
    """
    try:
        yield
    except (TypeError, ValueError):  # a wrong argument or an invalid card: says all itself
        raise
    except Exception as error:
        raise OSError(
            f"Could not upload to {repo_id}: {reason_of(error)}. {kept} "
            "Push again: what has arrived is not sent twice."
        ) from error


def reason_of(error: BaseException) -> str:
    """Tell an error and what caused it, in one line."""
    told: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}".rstrip(".: ")
        if reason not in told:  # HTTP clients wrap each other's
            told.append(reason)
        cause = cause.__cause__
    return ", because of ".join(told)


def check_weights(folder_or_repository: str | os.PathLike, arguments: dict[str, Any]) -> None:
    """Raise unless a checkpoint's weights are in safetensors, all of them in its own folder.

    Args:
        folder_or_repository: As for ``from_pretrained``.
        arguments: The other arguments of ``from_pretrained``.

    Raises:
        OSError: If there is no safetensors file, or its index names other files.
    """
    path = os.fspath(folder_or_repository)
    if os.path.isfile(path):
        names = [os.path.basename(path)]
    elif _find(path, SAFE_WEIGHTS_NAME, arguments) is not None:
        return
    else:
        index = _find(path, SAFE_WEIGHTS_INDEX_NAME, arguments)
        names = []
        if index is not None:
            with open(index, encoding="utf-8") as file:
                names = sorted(set(json.load(file).get("weight_map", {}).values()))
    foreign = [name for name in names if not name.endswith(".safetensors") or os.path.basename(name) != name]
    if foreign or not names:
        found = f"it names {foreign[0]}" if foreign else "it has none"
        raise OSError(
            f"{path} must hold its weights as {SAFE_WEIGHTS_NAME}, but {found}. Pickled weights such as "
            "pytorch_model.bin are never read, because they can run code. Ask for a checkpoint that was saved with "
            "save_pretrained."
        )


def _find(path: str, name: str, arguments: dict[str, Any]) -> str | None:
    """Return where a file of the checkpoint is on this machine, fetched if need be; ``None`` if there is none."""
    if variant := arguments.get("variant"):
        stem, ending = name.rsplit(".", 1)
        name = f"{stem}.{variant}.{ending}"
    location = {key: arguments[key] for key in _LOCATION if key in arguments}
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **location)
