"""Limits for the sizes of untrusted configurations, checked before memory is allocated."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .configuration import MultiExitConfig
from .stages import Anatomy

# Parameters and buffers of one model, counted in values. The largest timm model, a ViT, has 6.8 billion.
MAX_VALUES = 10_000_000_000

# Tensors that the constructor of a backbone may create. hrnet_w64 creates 2,000, more than any other timm model.
MAX_TENSORS = 10_000

# Values that loading may initialise because the checkpoint does not hold them: classifiers for other classes, tables
# of relative positions. More is rejected unless the checkpoint itself is larger.
MAX_NEW_VALUES = 100_000_000

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
