"""Export of a multi-exit model's backbone as a plain timm checkpoint."""

import json
import os
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from .configuration import MultiExitConfig
from .timm_quirks import copy_module, without_pooling

# The fields that timm builds its transforms from.
_TRANSFORMS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def save_timm_checkpoint(backbone: nn.Module, config: MultiExitConfig, folder: str | os.PathLike) -> None:
    """Write a backbone as timm does: ``model.safetensors`` and timm's own ``config.json``.

    Args:
        backbone: A timm model, with the projection in front of its classifier that ``exit_width`` may have put there.
        config: Its configuration.
        folder: Output folder; created if it does not exist.

    Raises:
        ValueError: If timm has no equal architecture, or the folder holds a multi-exit model.
    """
    if config.small_input_stem:
        raise ValueError(
            "small_input_stem builds a stem that no timm architecture has, so timm could not load the checkpoint. "
            "Share the multi-exit model with save_pretrained, or train one without small_input_stem."
        )
    path = os.path.join(folder, "config.json")
    if os.path.isfile(path) and _read(path).get("model_type") == config.model_type:
        raise ValueError(
            f"{os.fspath(folder)} holds a multi-exit model, whose files have the names of timm's. Choose another "
            "folder."
        )
    plain = copy_module(backbone)
    _fold_projection(plain)
    plain.register_state_dict_post_hook(_separate)
    save_for_hf(
        plain,
        folder,
        model_config={"label_names": [config.id2label.get(index, str(index)) for index in range(plain.num_classes)]},
        data_config={name: config.pretrained_cfg[name] for name in _TRANSFORMS if name in config.pretrained_cfg},
        safe_serialization=True,
    )
    fields = _read(path)
    fields["model_args"].pop("num_classes", None)  # also stored elsewhere, and transformers fails on a second one
    with open(path, "w") as file:
        json.dump(fields, file, indent=2)


@torch.no_grad()
def _fold_projection(backbone: nn.Module) -> None:
    """Fold the projection and the classifier of ``exit_width`` into one linear layer, multiplied in float64."""
    classifier = without_pooling(backbone.get_classifier())
    if not isinstance(classifier, nn.Sequential):
        return
    projection, last = classifier
    folded = nn.Linear(projection.in_features, last.out_features).to(last.weight)
    folded.weight.copy_(last.weight.double() @ projection.weight.double())
    folded.bias.copy_(last.weight.double() @ projection.bias.double() + last.bias.double())
    path = next(path for path, module in backbone.named_modules() if module is classifier)
    backbone.set_submodule(path, folded)


def _separate(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """Copy every tensor: safetensors accepts neither shared tensors (coat) nor views."""
    state.update({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()})


def _read(path: str) -> dict[str, Any]:
    with open(path) as file:
        return json.load(file)
