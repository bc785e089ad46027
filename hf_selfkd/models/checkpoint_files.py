"""Files of checkpoints: which weights are read, whether they are complete, and how a folder is uploaded."""

import json
import os
from collections.abc import Collection
from typing import Any

from huggingface_hub import create_repo
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import create_and_tag_model_card

# The arguments of from_pretrained that say where a file is. Without force_download: transformers downloads again
# whatever it loads, and the checks here read the same files.
LOCATION_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_weights(folder_or_repository: str | os.PathLike, arguments: dict[str, Any]) -> None:
    """Check that all weights of a checkpoint are in safetensors files of its own folder.

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
            "pytorch_model.bin are never read, because they can run code. Use a checkpoint that was saved with "
            "save_pretrained."
        )


def _find(path: str, name: str, arguments: dict[str, Any]) -> str | None:
    """Return the local path of a file of the checkpoint, downloaded if needed; ``None`` if it does not exist."""
    if variant := arguments.get("variant"):
        stem, ending = name.rsplit(".", 1)
        name = f"{stem}.{variant}.{ending}"
    location = {key: arguments[key] for key in LOCATION_ARGUMENTS if key in arguments}
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **location)


def check_loaded(source, info: dict[str, Any], ignore_mismatched_sizes: bool) -> None:
    """Check that all weights of a model came from the checkpoint and none were left over.

    Args:
        source: The checkpoint, for the message.
        info: The loading info of ``from_pretrained``.
        ignore_mismatched_sizes: Whether weights may have other shapes than the model's.

    Raises:
        ValueError: If weights and configuration do not match.
    """
    missing = sorted(name for name in info["missing_keys"] if not is_optional(name))
    unexpected = sorted(info["unexpected_keys"])
    if missing or unexpected:
        raise ValueError(
            f"The weights in {source} do not match its configuration. Missing keys: {shorten(missing)}. Unexpected "
            f"keys: {shorten(unexpected)}. Load them with the configuration they were saved with."
        )
    if info["mismatched_keys"] and not ignore_mismatched_sizes:
        name, stored, expected = min(info["mismatched_keys"])
        raise ValueError(
            f"The weights in {source} have other shapes than the model: {name} is {tuple(stored)} instead of "
            f"{tuple(expected)} ({len(info['mismatched_keys'])} keys in all). With ignore_mismatched_sizes=True "
            "they are newly initialised."
        )


def is_optional(name: str) -> bool:
    """Whether a checkpoint may lack a tensor: the counter of batch norm, which frozen batch norm does not have."""
    return name.endswith(".num_batches_tracked")


def shorten(names: Collection[str]) -> str:
    """List the first three of many names, with their number."""
    return f"{', '.join(list(names)[:3]) or 'none'} ({len(names)} in all)"


def save_image_processor(config: PreTrainedConfig, folder: str | os.PathLike) -> None:
    """Write timm's image processor to preprocessor_config.json, for tools that do not read config.json.

    Another one, such as the one that a trainer was given, is not in the configuration: it is saved on its own, as for
    every transformers model.
    """
    if config.image_processor_type != type(config).image_processor_type:
        return
    fields = {name: getattr(config, name) for name in ("image_processor_type", "pretrained_cfg")}
    with open(os.path.join(folder, IMAGE_PROCESSOR_NAME), "w", encoding="utf-8") as file:
        json.dump(fields, file, indent=2)
        file.write("\n")


def upload(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    before: dict[str, float],
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    **kwargs,
) -> None:
    """Upload the files of a complete folder that are newer than ``before``, with its card or a short one.

    Args:
        model: The model that was saved.
        folder: The folder.
        before: Modification times of its files before the model was saved, by name.
        repo_id: Repository; ``None`` for the name of the folder.
        private: Whether a new repository is private.
        token: Token for the Hub.
        kwargs: ``commit_message``, ``create_pr`` and ``revision``.
    """
    repo_id = os.path.basename(os.path.abspath(folder)) if repo_id is None else repo_id
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    card = os.path.join(folder, "README.md")
    before.pop("README.md", None)
    if not os.path.isfile(card):
        create_and_tag_model_card(repo_id, model.model_tags, token=token).save(card)
    model._upload_modified_files(folder, repo_id, before, token=token, **kwargs)
