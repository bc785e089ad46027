"""Limits for untrusted configurations and checkpoints, checked before memory is allocated.

A model that is too large is refused, and weights are read from safetensors only.
"""

import copy
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration import MultiExitConfig
from .stages import Anatomy

# Parameters and buffers of one model, counted in values. The largest timm model, a ViT, has 6.8 billion.
MAX_VALUES = 10_000_000_000

# Tensors that the constructor of a backbone may create. hrnet_w64, the most found among timm's models, creates 2,000.
MAX_TENSORS = 10_000

# Values that loading may initialise because the checkpoint does not hold them: classifiers for other classes, tables
# of relative positions. More is refused unless the checkpoint itself is larger.
MAX_NEW_VALUES = 100_000_000

# The arguments of from_pretrained that say where a file is. Without force_download: transformers downloads again
# whatever it loads, and these modules read beside it.
LOCATION_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")

_FACTORIES = {torch.empty, torch.full, torch.ones, torch.rand, torch.randn, torch.tensor, torch.zeros}


class _TensorLimit(TorchFunctionMode):
    """Stops a constructor that creates too many tensors: its modules take memory even where the tensors take none."""

    def __init__(self, config: MultiExitConfig):
        super().__init__()
        self.config = config
        self.num_tensors = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num_tensors += func in _FACTORIES
        if self.num_tensors > MAX_TENSORS:
            raise ValueError(
                f"A backbone may have {MAX_TENSORS:,} tensors, but more are requested by {sizes(self.config)}."
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def limited(config: MultiExitConfig) -> Iterator[None]:
    """Raise ValueError if what is built inside has more than ``MAX_TENSORS`` tensors, or impossible ones."""
    try:
        with _TensorLimit(config):
            yield
    except RuntimeError as error:
        raise ValueError(f"No backbone can be built from {sizes(config)}: {error}") from error


def rehearse(model_class: type[nn.Module], config: MultiExitConfig) -> Anatomy | None:
    """Build a model on the meta device, where tensors take no memory, to check its size and measure its backbone.

    Args:
        model_class: Built from the configuration alone.
        config: Configuration of the model.

    Returns:
        The measured structure of its backbone; ``None`` on the meta device itself, where nothing needs rehearsing.

    Raises:
        ValueError: If the model has more than ``MAX_VALUES`` values.
    """
    if torch.get_default_device().type == "meta":
        return None
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    num_values = count_values([*model.parameters(), *model.buffers()])
    if num_values > MAX_VALUES:
        raise ValueError(
            f"A model may have {MAX_VALUES:,} values, but {num_values:,} are requested by {sizes(config)}."
        )
    return model.anatomy


def count_values(tensors: Iterable[Tensor]) -> int:
    """Count the values of all tensors."""
    return sum(tensor.numel() for tensor in tensors)


def sizes(config: MultiExitConfig) -> str:
    """Format the fields of a configuration that determine the size of a model."""
    names = ("num_labels", "exit_width", "pyramid_width", "backbone", "backbone_kwargs")
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in names)


def check_new_values(model: nn.Module, missing: set[str]) -> None:
    """Check that a checkpoint is not far smaller than the model that its configuration describes.

    Args:
        model: A model after its checkpoint was read and before missing tensors are allocated.
        missing: Names of the parameters and buffers that the checkpoint does not hold.

    Raises:
        ValueError: If more than ``MAX_NEW_VALUES`` values, and more than the checkpoint holds, are missing.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    new = {name: tensor for name, tensor in tensors.items() if name in missing}
    num_values = count_values(new.values())
    present = count_values(tensors.values()) - num_values
    if num_values > max(MAX_NEW_VALUES, present):
        largest = max(new, key=lambda name: new[name].numel())
        raise ValueError(
            f"The checkpoint holds {present:,} values of the model, but {num_values:,} more are requested by "
            f"{sizes(model.config)}; the largest is {largest}, {' x '.join(map(str, new[largest].shape))}. Load it "
            "with the configuration it was saved with."
        )


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
