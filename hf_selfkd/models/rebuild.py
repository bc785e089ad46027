"""Whether a configuration builds the model that is saved with it: backbones are changed after they were built."""

import json
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_files import is_optional, shorten

# The fields of a configuration that decide which tensors a model has.
_STRUCTURE = (
    *("backbone", "backbone_kwargs", "exits", "exit_width", "num_labels", "pyramid_width"),
    "small_input_stem",
)

Shapes = dict[str, tuple[int, ...]]


def check_rebuilds(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Check that a model that is built from the configuration takes the weights.

    Args:
        model: A multi-exit model.
        weights: Its state without the scaffold.

    Raises:
        ValueError: If the configuration builds other tensors.

    Warns:
        UserWarning: If it builds tables of another size, which are not saved: those of another image size.
    """
    fields = {name: getattr(model.config, name) for name in _STRUCTURE}
    try:
        built, tables = _built_shapes(type(model), json.dumps(fields, sort_keys=True))
    except TypeError as error:
        raise ValueError(
            f"backbone_kwargs must be values that JSON has, but got {fields['backbone_kwargs']}."
        ) from error
    shared = model._tied_weights_keys or {}  # saved once, under another name
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    lacks = sorted(name for name in built.keys() - shapes.keys() - shared.keys() if not is_optional(name))
    adds = sorted(shapes.keys() - built.keys())
    others = sorted(name for name in built.keys() & shapes.keys() if built[name] != shapes[name])
    if lacks or adds or others:
        differences = [f"it lacks {shorten(lacks)}"] if lacks else []
        if adds:
            differences.append(f"it has {shorten(adds)} in addition")
        if others:
            shape = f"{shapes[others[0]]} instead of {built[others[0]]}"
            differences.append(f"the shape of {others[0]} is {shape} ({len(others)} in all)")
        raise ValueError(
            "The model is not the one that its configuration builds, so from_pretrained could not load it: "
            f"{', and '.join(differences)}. Nothing was saved. {_advice(model)}"
        )
    found = _table_shapes(model)
    if differing := sorted(name for name in tables.keys() & found.keys() if tables[name] != found[name]):
        warnings.warn(
            f"The backbone was changed for another image size ({differing[0]} is {found[differing[0]]} instead of "
            f"{tables[differing[0]]}), which the saved model will not take. Build it for this size, with "
            "backbone_kwargs={'img_size': ...}.",
            stacklevel=3,
        )


@lru_cache(maxsize=64)
def _built_shapes(model_class: type[nn.Module], fields: str) -> tuple[Shapes, Shapes]:
    with torch.device("meta"):
        model = model_class(model_class.config_class(**json.loads(fields)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, _table_shapes(model)


def _table_shapes(model: nn.Module) -> Shapes:
    return {name: tuple(buffer.shape) for name, buffer in model.named_non_persistent_buffers()}


def _advice(model: Any) -> str:
    config, num_classes = model.config, getattr(model.backbone, "num_classes", 0)
    if hasattr(model, "peft_config"):
        return "Save the adapter from the PEFT model, or merge it first with merge_and_unload()."
    if num_classes not in (0, config.num_labels):
        return (
            f"The classifier has {num_classes} classes, but config.num_labels is {config.num_labels}: one of them was "
            "replaced, and the exits were not. Build the model with the new num_labels, or load a checkpoint with "
            "num_labels=..., ignore_mismatched_sizes=True."
        )
    return (
        "Give what changes the backbone (set_input_size, another classifier) as arguments when building it, such as "
        "backbone_kwargs={'img_size': ...}, and reparameterize after loading. "
        "torch.save(model.state_dict(), ...) keeps these weights."
    )
