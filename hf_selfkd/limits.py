"""How large a network a configuration may ask for: it may come from anyone, and is refused before it takes memory."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
