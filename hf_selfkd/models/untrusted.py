"""What a configuration and a checkpoint may ask for: they may come from anyone.

A network that is too large is refused before it takes memory, and weights are read from safetensors only.
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

# Of one model, its buffers included. The largest timm model, a ViT, has 6.8 billion.
MAX_VALUES = 10_000_000_000

# Tensors that the constructor of a backbone may create. hrnet_w64, the most found among timm's models, creates 2,000.
MAX_TENSORS = 10_000

# Values that loading may draw or compute because the checkpoint does not hold them: classifiers for other classes,
# tables of relative positions. More is refused unless the checkpoint itself is larger.
MAX_NEW_VALUES = 100_000_000

_FACTORIES = {torch.empty, torch.full, torch.ones, torch.rand, torch.randn, torch.tensor, torch.zeros}


class _TooManyTensors(Exception):
    """A constructor goes beyond MAX_TENSORS."""


class _TensorLimit(TorchFunctionMode):
    """Stops a constructor that goes on and on: its modules cost memory even where its tensors cost none."""

    num_tensors = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num_tensors += func in _FACTORIES
        if self.num_tensors > MAX_TENSORS:
            raise _TooManyTensors
        return func(*args, **(kwargs or {}))


@contextmanager
def limited(config: MultiExitConfig) -> Iterator[None]:
    """Turn a construction that creates more than ``MAX_TENSORS`` tensors, or impossible ones, into a ValueError."""
    try:
        with _TensorLimit():
            yield
    except _TooManyTensors:
        message = f"A backbone may have {MAX_TENSORS:,} tensors, but more are asked for by {sizes(config)}."
        raise ValueError(message) from None
    except RuntimeError as error:
        raise ValueError(f"No backbone can be built from {sizes(config)}: {error}") from error


def rehearse(model_class: type[nn.Module], config: MultiExitConfig) -> None:
    """Build a model on the meta device, where tensors take no memory, to see whether it is too large for another.

    Args:
        model_class: Built from the configuration alone.
        config: What to build.

    Raises:
        ValueError: If the model has more than ``MAX_VALUES`` values.
    """
    if torch.get_default_device().type == "meta":
        return
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    num_values = count_values([*model.parameters(), *model.buffers()])
    if num_values > MAX_VALUES:
        raise ValueError(
            f"A model may have {MAX_VALUES:,} values, but {num_values:,} are asked for by {sizes(config)}."
        )


def count_values(tensors: Iterable[Tensor]) -> int:
    """Count the values of all tensors."""
    return sum(tensor.numel() for tensor in tensors)


def sizes(config: MultiExitConfig) -> str:
    """Name the fields of a configuration that set how large a model is, with their values."""
    names = ("num_labels", "exit_width", "pyramid_width", "backbone", "backbone_kwargs")
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in names)


def check_new_values(model: nn.Module, missing: set[str]) -> None:
    """Raise ValueError if a checkpoint holds far too little for the model that its configuration describes.

    Args:
        model: A model after its checkpoint was read, and before what is missing is made.
        missing: Names of the parameters and buffers that the checkpoint does not hold.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    new = {name: tensor for name, tensor in tensors.items() if name in missing}
    num_values = count_values(new.values())
    present = count_values(tensors.values()) - num_values
    if num_values > max(MAX_NEW_VALUES, present):
        largest = max(new, key=lambda name: new[name].numel())
        raise ValueError(
            f"The checkpoint holds {present:,} values of the model, but {num_values:,} more are asked for by "
            f"{sizes(model.config)}; the largest is {largest}, {' x '.join(map(str, new[largest].shape))}. Load it "
            "with the configuration it was saved with."
        )


# What of the arguments of from_pretrained says where a file is.
_LOCATION = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


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
