"""Create a timm model that exits can be attached to."""

import difflib

import timm
from timm.layers import ClassifierHead
from timm.models import get_arch_pretrained_cfgs, parse_model_name
from torch import nn

# Pooling that follows the first convolution, per family.
_STEM_POOLS = ("features.conv1_pool", "features.pool0", "maxpool", "pool0", "stem.pool")


def create_backbone(
    name: str, *, num_classes: int | None, small_input_stem: bool, exit_width: int | None, **kwargs
) -> nn.Module:
    """Create a timm model that exits can be attached to.

    Args:
        name: What ``timm.create_model`` takes.
        num_classes: Number of classes, ``None`` for timm's own.
        small_input_stem: Whether to replace the stem by one for 32-pixel images.
        exit_width: Width to project the pre-logits to, ``None`` to leave them alone.
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
            f"timm model '{name}' is an encoder without a classifier, so it has no deepest exit. Choose a model "
            f"with get_classifier(){_classifier_of(name)}."
        )
    if backbone.num_classes == 0:
        raise ValueError(f"timm model '{name}' has no classes of its own. Give num_labels.")
    if small_input_stem:
        _shrink_stem(backbone, name)
    if exit_width is not None:
        _project_features(backbone, name, exit_width)
    return backbone


def _check_name(name: str) -> None:
    """Raise if a name without a source such as ``hf-hub:`` is not among timm's architectures and their tags."""
    source, architecture = parse_model_name(name)
    architecture, _, tag = architecture.partition(".")
    if source is not None:
        return
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f"Unknown timm model '{name}'. "
            + (f"Did you mean {' or '.join(repr(match) for match in near)}?" if near else "See timm.list_models().")
        )
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise ValueError(f"timm model '{architecture}' has no tag '{tag}'. Available: {', '.join(tags) or 'none'}.")


def _classifier_of(name: str) -> str:
    classifier = name.partition(".")[0].removesuffix("_enc")
    return f", such as '{classifier}'" if ":" not in name and timm.is_model(classifier) else ""


def _shrink_stem(backbone: nn.Module, name: str) -> None:
    """Make the first convolution 3x3 with stride 1, keeping its weights if it is 3x3, and drop the pooling behind."""
    path = backbone.pretrained_cfg.get("first_conv")
    conv = backbone.get_submodule(path) if isinstance(path, str) else None
    if not isinstance(conv, nn.Conv2d) or conv.stride in ((1, 1), conv.kernel_size):
        raise ValueError(
            f"small_input_stem needs a backbone that starts with a strided convolution, but '{name}' does not. "
            "For patch-based models give backbone_kwargs such as {'img_size': 32, 'patch_size': 4}."
        )
    if conv.kernel_size == (3, 3):
        conv.stride = (1, 1)
    else:
        small = type(conv)(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        backbone.set_submodule(path, small)
    modules = dict(backbone.named_modules())
    for pool in _STEM_POOLS:
        if pool in modules and getattr(modules[pool], "stride", None) not in (1, (1, 1)):
            backbone.set_submodule(pool, nn.Identity())


def _project_features(backbone: nn.Module, name: str, width: int) -> None:
    """Put a linear projection to ``width`` and a new classifier in the place of the classifier (LSH, section 3.1)."""
    classifier = backbone.get_classifier()
    classifier = classifier.fc if isinstance(classifier, ClassifierHead) else classifier
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
