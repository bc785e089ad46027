"""Backbones from timm names, and the configurations that rebuild them."""

import copy
import warnings
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs, parse_model_name
from torch import nn

from .configuration import REFUSED_BACKBONE_KWARGS, MultiExitConfig
from .did_you_mean import did_you_mean
from .dry_run import input_shape
from .timm_file import check_folder, count_classes, data_of
from .timm_quirks import STEM_POOLS, without_pooling


def create_backbone(
    name: str, *, num_classes: int | None, small_input_stem: bool, exit_width: int | None, **kwargs
) -> nn.Module:
    """Create a timm model that exits can be attached to.

    Args:
        name: Any name that ``timm.create_model`` takes.
        num_classes: Number of classes, ``None`` for timm's own.
        small_input_stem: Whether to replace the stem by one for 32-pixel images.
        exit_width: Width to project the pre-logits to, ``None`` to keep them.
        kwargs: Passed to ``timm.create_model``.

    Raises:
        ValueError: If timm does not know the name, the model has no ``feature_info`` or no classifier, or its stem
            or classifier cannot be changed.
    """
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    _check_name(name)
    backbone = timm.create_model(name, **kwargs)
    if not getattr(backbone, "feature_info", None):
        raise ValueError(
            f"timm model '{name}' has no feature_info, so it cannot be given exits. Choose a model for which "
            "timm.create_model(name).feature_info names the stages, or give the class that attribute."
        )
    if not hasattr(backbone, "get_classifier"):
        raise ValueError(
            f"timm model '{name}' is an encoder without a classifier, so it has no final exit. Choose a model "
            f"with get_classifier(){_classifier_of(name)}."
        )
    if backbone.num_classes == 0:
        raise ValueError(f"timm model '{name}' has no classes of its own. Pass num_labels.")
    change_backbone(backbone, name, small_input_stem=small_input_stem, exit_width=exit_width)
    return backbone


def change_backbone(backbone: nn.Module, name: str, *, small_input_stem: bool, exit_width: int | None) -> None:
    """Change a timm model as the configuration asks for. Arguments as for :func:`create_backbone`."""
    if small_input_stem:
        _shrink_stem(backbone, name)
    if exit_width is not None:
        _project_features(backbone, name, exit_width)


def _check_name(name: str) -> None:
    """Raise ValueError for an unknown architecture or tag in a name without a source such as ``hf-hub:``."""
    source, architecture = parse_model_name(name)
    architecture, _, tag = architecture.partition(".")
    if source is not None:
        return
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models()) or " See timm.list_models()."
        raise ValueError(f"Unknown timm model '{name}'.{hint}")
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise ValueError(f"timm model '{architecture}' has no tag '{tag}'. Available: {', '.join(tags) or 'none'}.")


def _classifier_of(name: str) -> str:
    classifier = name.partition(".")[0].removesuffix("_enc")
    return f", such as '{classifier}'" if ":" not in name and timm.is_model(classifier) else ""


def _shrink_stem(backbone: nn.Module, name: str) -> None:
    """Make the first convolution 3x3 with stride 1 and remove the pooling after it; 3x3 weights are kept."""
    path = backbone.pretrained_cfg.get("first_conv")
    conv = backbone.get_submodule(path) if isinstance(path, str) else None
    if not isinstance(conv, nn.Conv2d) or conv.stride in ((1, 1), conv.kernel_size):
        raise ValueError(
            f"small_input_stem needs a backbone that starts with a strided convolution, but '{name}' does not. "
            "For patch-based models pass backbone_kwargs such as {'img_size': 32, 'patch_size': 4}."
        )
    if conv.kernel_size == (3, 3):
        conv.stride = (1, 1)
    else:
        small = type(conv)(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        backbone.set_submodule(path, small)
    modules = dict(backbone.named_modules())
    for pool in STEM_POOLS:
        if pool in modules and getattr(modules[pool], "stride", None) not in (1, (1, 1)):
            backbone.set_submodule(pool, nn.Identity())


def _project_features(backbone: nn.Module, name: str, width: int) -> None:
    """Replace the classifier by a linear projection to ``width`` and a new classifier (LSH, section 3.1)."""
    classifier = without_pooling(backbone.get_classifier())
    if not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"exit_width needs a backbone with one linear classifier, but that of '{name}' is a "
            f"{type(classifier).__name__}. Leave exit_width at None."
        )
    if width == classifier.in_features:
        return
    path = next(path for path, module in backbone.named_modules() if module is classifier)
    projection = nn.Linear(classifier.in_features, width)
    backbone.set_submodule(path, nn.Sequential(projection, nn.Linear(width, classifier.out_features)))


def data_config(backbone: nn.Module, small_input_stem: bool) -> dict[str, Any]:
    """Return the data configuration that timm's ``resolve_data_config`` reads, in JSON types."""
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
    name: str, pretrained: bool, num_labels: int | None, fields: dict[str, Any]
) -> tuple[MultiExitConfig, nn.Module]:
    """Build a timm model, and the configuration that rebuilds it.

    Args:
        name: Any name that ``timm.create_model`` takes.
        pretrained: Whether to load timm's weights.
        num_labels: Number of classes; ``None`` keeps timm's classifier and, if pretrained, its label names.
        fields: Fields of :class:`MultiExitConfig`.

    Raises:
        ValueError: If ``fields`` set the number of classes a second time.
    """
    fields = dict(fields)
    given = dict(fields.pop("backbone_kwargs", None) or {})
    if name.startswith("local-dir:"):
        check_folder(name.removeprefix("local-dir:"))
    if "num_classes" in given:
        raise ValueError("Pass the number of classes as num_labels, not in backbone_kwargs.")
    stem, width = fields.get("small_input_stem", False), fields.get("exit_width")
    data = {}
    if given.get("checkpoint_path"):
        backbone, data = _create_from_file(name, num_labels, pretrained, given)
    else:
        backbone = _create(name, num_labels, pretrained, given)
    change_backbone(backbone, name, small_input_stem=stem, exit_width=width)
    labels = {"num_labels": backbone.num_classes}
    has_names = (pretrained and num_labels is None) or len(data.get("label_names", ())) == backbone.num_classes
    if has_names and "id2label" not in fields:
        labels = label_names(backbone) or labels
    return MultiExitConfig(**describe(backbone, name, pretrained, given), **(labels | fields)), backbone


def _create(name: str, num_classes: int | None, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    plain = {"small_input_stem": False, "exit_width": None}
    return create_backbone(name, num_classes=num_classes, pretrained=pretrained, **plain, **given)


def _create_from_file(
    name: str, num_labels: int | None, pretrained: bool, given: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Create a timm model with the weights of a file, and a new classifier if the file has other classes.

    Returns:
        The model, and what the folder of the file says about the data.
    """
    path, architecture = given["checkpoint_path"], parse_model_name(name)[1].partition(".")[0]
    _check_name(name)
    data = data_of(path, architecture)
    num_classes = count_classes(path, architecture) or num_labels
    overlay = data | (given.get("pretrained_cfg_overlay") or {})
    backbone = _create(name, num_classes, pretrained, given | {"pretrained_cfg_overlay": overlay})
    if num_labels not in (None, num_classes):
        warnings.warn(
            f"{path} has a classifier for {num_classes} classes, so the one for num_labels={num_labels} starts anew.",
            stacklevel=4,
        )
        backbone.reset_classifier(num_labels)
    return backbone, data


def describe(backbone: nn.Module, name: str, pretrained: bool, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that rebuild the backbone, including arguments from a Hub repository.

    Args:
        backbone: A model that timm built.
        name: Its name; the tag of a Hub repository or folder is not timm's and is left out.
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
        # Where transformers records the source of a model; the model card calls it the base model.
        "name_or_path": (backbone.pretrained_cfg.get("hf_hub_id") or "") if pretrained and not from_file else "",
    }


def label_names(backbone: nn.Module) -> dict[str, Any] | None:
    """Return ImageNet's label names if timm knows that the weights were trained on its classes."""
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
