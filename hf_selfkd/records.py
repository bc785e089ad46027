"""What a timm model records about itself, arguments, data configuration, names of its labels, and what rebuilds it."""

import copy
from typing import Any

from torch import nn

from .backbone import input_shape
from .configuration import REFUSED_BACKBONE_KWARGS, MultiExitConfig
from .creation import create_backbone


def data_config(backbone: nn.Module, small_input_stem: bool) -> dict[str, Any]:
    """Return what timm's ``resolve_data_config`` reads, as JSON has it."""
    keys = ("architecture", "input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode", "fixed_input_size")
    cfg = {key: backbone.pretrained_cfg[key] for key in keys if key in backbone.pretrained_cfg}
    channels, *size = input_shape(backbone)
    cfg["input_size"] = (channels, *([32, 32] if small_input_stem else size))
    if small_input_stem:
        cfg["crop_pct"] = 1.0
    for name in ("mean", "std"):
        if channels != len(cfg[name]):  # timm averages the stem's weights over channels, or repeats them
            cfg[name] = [sum(cfg[name]) / len(cfg[name])] * channels
    return {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.items()}


def create_recorded(
    name: str, pretrained: bool, num_labels: int | None, fields: dict[str, Any], exit_width: int | None = None
) -> tuple[MultiExitConfig, nn.Module]:
    """Build a timm model, and the configuration that rebuilds it.

    Args:
        name: All that ``timm.create_model`` takes.
        pretrained: Whether to fetch timm's weights.
        num_labels: Number of classes; ``None`` keeps timm's classifier and, if pretrained, its label names.
        fields: Fields of :class:`MultiExitConfig`.
        exit_width: Of the pre-logits, see :func:`create_backbone`.

    Raises:
        ValueError: If ``fields`` give the number of classes a second time.
    """
    fields = dict(fields)
    given = dict(fields.pop("backbone_kwargs", None) or {})
    if "num_classes" in given:
        raise ValueError("Give the number of classes as num_labels, not in backbone_kwargs.")
    backbone = create_backbone(
        name,
        num_classes=num_labels,
        small_input_stem=fields.get("small_input_stem", False),
        exit_width=exit_width,
        pretrained=pretrained,
        **given,
    )
    labels = {"num_labels": backbone.num_classes}
    if pretrained and num_labels is None and "id2label" not in fields:
        labels = label_names(backbone) or labels
    return MultiExitConfig(**describe(backbone, name, pretrained, given), **(labels | fields)), backbone


def describe(backbone: nn.Module, name: str, pretrained: bool, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that rebuild the backbone, with what a Hub repository brought.

    Args:
        backbone: What timm built.
        name: What it was built from; of a Hub repository or folder the tag is not timm's and left out.
        pretrained: Whether it has the weights that its tag names.
        given: The arguments it was built with.
    """
    architecture, tag = backbone.pretrained_cfg["architecture"], backbone.pretrained_cfg.get("tag")
    recorded = {**getattr(backbone, "_model_args", {}), **given}
    kept = {key: value for key, value in recorded.items() if key not in REFUSED_BACKBONE_KWARGS}
    from_file = backbone.pretrained_cfg.get("file") or "checkpoint_path" in given
    return {
        "backbone": f"{architecture}.{tag}" if pretrained and tag and ":" not in name else architecture,
        "backbone_kwargs": copy.deepcopy(kept),
        # Where transformers notes what a model was loaded from; the model card calls it the base model.
        "name_or_path": (backbone.pretrained_cfg.get("hf_hub_id") or "") if pretrained and not from_file else "",
    }


def label_names(backbone: nn.Module) -> dict[str, Any] | None:
    """Return ImageNet's label names where timm knows that the weights answer with them."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    cfg = backbone.pretrained_cfg
    if cfg.get("label_names"):
        names = list(cfg["label_names"])
    elif subset := infer_imagenet_subset({**cfg, "num_classes": backbone.num_classes}):
        names = ImageNetInfo(subset).label_descriptions()
    else:
        return None
    id2label = dict(enumerate(names))
    return {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
