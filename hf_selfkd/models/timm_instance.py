"""Configurations that rebuild a timm model which exists already, with its weights."""

from typing import Any

import torch
from torch import nn

from .configuration import MultiExitConfig
from .timm_factory import change_backbone, create_backbone, describe, label_names
from .timm_quirks import copy_module


def record_instance(
    backbone: nn.Module, num_labels: int | None, fields: dict[str, Any]
) -> tuple[MultiExitConfig, nn.Module]:
    """Return the configuration that rebuilds a timm model, and a copy of the model.

    Args:
        backbone: A model that ``timm.create_model`` built; it is not changed.
        num_labels: Number of classes; another one than the model's gives the copy a new classifier. ``None`` keeps its
            own and, if timm knows them, its label names.
        fields: Fields of :class:`MultiExitConfig`. ``backbone_kwargs`` are arguments that the model was built with, in
            addition to those that timm recorded.

    Raises:
        TypeError: If ``backbone`` is not a timm model.
        ValueError: If its name and arguments build another model.
    """
    _check_instance(backbone)
    fields = dict(fields)
    given = dict(fields.pop("backbone_kwargs", None) or {})
    described = describe(backbone, backbone.pretrained_cfg["architecture"], False, given)
    kwargs = {name: value for name, value in described["backbone_kwargs"].items() if name != "num_classes"}
    described["backbone_kwargs"] = kwargs
    try:
        with torch.device("meta"):
            rebuilt = create_backbone(
                described["backbone"],
                num_classes=backbone.num_classes,
                small_input_stem=False,
                exit_width=None,
                **kwargs,
            )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{_refused(described)} builds no model: {error}") from error
    if difference := _first_difference(backbone, rebuilt):
        raise ValueError(
            f"{_refused(described)} builds another one: {difference}. Pass the arguments that it was built with as "
            "backbone_kwargs, or leave it as timm builds it."
        )
    labels = {"num_labels": backbone.num_classes if num_labels is None else num_labels}
    if num_labels is None and "id2label" not in fields:
        labels = label_names(backbone) or labels
    copied = copy_module(backbone).train()
    if labels.get("num_labels", copied.num_classes) != copied.num_classes:
        copied.reset_classifier(labels["num_labels"])
    name, width = described["backbone"], fields.get("exit_width")
    change_backbone(copied, name, small_input_stem=fields.get("small_input_stem", False), exit_width=width)
    return MultiExitConfig(**described, **(labels | fields)), copied


def _check_instance(backbone: nn.Module) -> None:
    if "exit_stages" in vars(backbone):
        raise TypeError(
            "from_backbone takes a timm model, but got a multi-exit model. Load it with from_pretrained, or pass its "
            "backbone."
        )
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    if not isinstance(backbone, nn.Module) or "architecture" not in cfg or not hasattr(backbone, "get_classifier"):
        raise TypeError(
            "from_backbone takes the name of a timm model or a classifier that timm.create_model built, without "
            f"features_only, but got {type(backbone).__name__}."
        )
    if backbone.num_classes == 0:
        raise ValueError(
            "The timm model has no classifier (num_classes=0), which would be the final exit. Build it with "
            "num_classes, or call backbone.reset_classifier(num_classes)."
        )


def _refused(described: dict[str, Any]) -> str:
    return (
        "A checkpoint must be able to rebuild the timm model by its name and arguments, but "
        f"timm.create_model({described['backbone']!r}, **{described['backbone_kwargs']})"
    )


def _first_difference(backbone: nn.Module, rebuilt: nn.Module) -> str | None:
    """Describe the first module or tensor in which two models differ, ``None`` if there is none."""
    for describe_parts in (_modules, _shapes):
        found, built = describe_parts(backbone), describe_parts(rebuilt)
        for name in [*found, *(name for name in built if name not in found)]:
            if found.get(name) != built.get(name):
                return f"{name} is {built.get(name, 'missing')} instead of {found.get(name, 'missing')}"
    return None


def _modules(model: nn.Module) -> dict[str, str]:
    return {path: f"{type(part).__name__}({part.extra_repr()})" for path, part in model.named_modules()}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
