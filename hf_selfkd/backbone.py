"""Stages of a timm model: where they end, what they give, and hooks that listen there.

The only file that knows timm. A forward hook sits where each stage of ``feature_info`` ends. During a call of
:func:`run` it hands the stage's output to that call's visitor, which may answer with a replacement (early exit answers
with fewer rows); outside of one it does nothing.
"""

import difflib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models import parse_model_name
from torch import Tensor, nn

# Index under which a visitor gets what enters the classifier, the stages being 0, 1, 2, ...
FEATURES = -1

# Pooling that follows the first convolution, per family, for small_input_stem.
_STEM_POOLS = ("maxpool", "features.pool0", "stem.pool")

# The visitor of the call that is running in this thread. Not on the model: that would break pickle and let two
# threads on one model see each other's images.
_active = threading.local()


@dataclass(frozen=True)
class Stage:
    """The end of one stage of a backbone.

    Args:
        module: Path of the module whose output is the stage's, or ``None`` where only timm's own
            ``forward_intermediates`` reaches it.
        channels: Channels of the map.
        size: Height and width of the map for an image of ``image_size``.
        image_size: Height and width of the image it was measured with.
        layout: ``"NCHW"``, ``"NHWC"`` or ``"NLC"`` (tokens).
        num_prefix_tokens: Tokens before those of the map, such as a class token.
        element: Which element of a list or tuple output is the map, ``None`` for a plain tensor.
    """

    module: str | None
    channels: int
    size: tuple[int, int]
    image_size: tuple[int, int]
    layout: str = "NCHW"
    num_prefix_tokens: int = 0
    element: int | None = None

    def to_map(self, output: Any, image_size: tuple[int, int]) -> Tensor:
        """View a raw output of the stage as a map ``(batch, channels, height, width)``."""
        tensor = output if self.element is None else output[self.element]
        if self.layout == "NCHW":
            return tensor
        if self.layout == "NHWC":
            return tensor.permute(0, 3, 1, 2)
        # Tokens do not know their grid: it scales with the image.
        height, width = (
            -(-side * cells // measured)
            for side, cells, measured in zip(image_size, self.size, self.image_size, strict=True)
        )
        tokens = tensor[:, self.num_prefix_tokens :]
        return tokens.transpose(1, 2).reshape(tensor.shape[0], self.channels, height, width)


@dataclass(frozen=True)
class Anatomy:
    """What a dry run found out about a backbone.

    Args:
        stages: Its stages, shallow to deep.
        width: Width of what enters the classifier.
    """

    stages: tuple[Stage, ...]
    width: int

    @property
    def hooked(self) -> bool:
        """Whether hooks see every stage; otherwise ``forward_intermediates`` is used."""
        return all(stage.module is not None for stage in self.stages)


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
            cannot be changed.
    """
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if ":" not in name and not timm.is_model(parse_model_name(name)[1].split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"Unknown timm model '{name}'. "
            + (f"Did you mean {' or '.join(repr(match) for match in near)}?" if near else "See timm.list_models().")
        )
    backbone = timm.create_model(name, **kwargs)
    if not getattr(backbone, "feature_info", None):
        raise ValueError(
            f"timm model '{name}' has no feature_info, so it cannot be given exits. Choose a model for which "
            "timm.create_model(name).feature_info names the stages, or give the class that attribute."
        )
    if not hasattr(backbone, "get_classifier"):
        raise ValueError(
            f"timm model '{name}' is an encoder without a classifier, so it has no deepest exit. Choose a model "
            "with get_classifier()."
        )
    if backbone.num_classes == 0:
        raise ValueError(f"timm model '{name}' has no classes of its own. Give num_labels.")
    if small_input_stem:
        _shrink_stem(backbone, name)
    if exit_width is not None:
        _project_features(backbone, name, exit_width)
    return backbone


def _shrink_stem(backbone: nn.Module, name: str) -> None:
    """Make the first convolution 3x3 with stride 1, keeping its weights if it is 3x3, and drop the pooling behind."""
    path = backbone.pretrained_cfg.get("first_conv")
    conv = backbone.get_submodule(path) if isinstance(path, str) else None
    if not isinstance(conv, nn.Conv2d) or conv.stride == conv.kernel_size or conv.kernel_size == (1, 1):
        raise ValueError(
            f"small_input_stem needs a backbone that starts with a strided convolution, but '{name}' does not. "
            "For patch-based models give backbone_kwargs such as {'img_size': 32, 'patch_size': 4}."
        )
    if conv.kernel_size == (3, 3):
        conv.stride = (1, 1)
    else:
        small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        backbone.set_submodule(path, small)
    modules = dict(backbone.named_modules())
    for pool in _STEM_POOLS:
        if pool in modules:
            backbone.set_submodule(pool, nn.Identity())


def _project_features(backbone: nn.Module, name: str, width: int) -> None:
    """Put a linear projection to ``width`` and a new classifier in the place of the classifier (LSH, section 3.1)."""
    classifier = backbone.get_classifier()
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


def _classifiers(backbone: nn.Module) -> list[nn.Module]:
    """List the modules whose inputs are the pre-logits: one, or several for distilled and multi-branch models."""
    classifier = backbone.get_classifier()
    if isinstance(classifier, nn.Sequential):  # made by _project_features
        classifier = classifier[-1]
    return list(classifier) if isinstance(classifier, (tuple, list, nn.ModuleList)) else [classifier]


def _report(index: int, module: nn.Module, args: Any, output: Any) -> Any:
    visitor = getattr(_active, "visitor", None)
    return None if visitor is None else visitor(index, output)


def _report_features(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    visitor = getattr(_active, "visitor", None)
    if visitor is not None:
        visitor(FEATURES, args[0].flatten(1))


def attach_hooks(backbone: nn.Module, anatomy: Anatomy) -> None:
    """Let the visitor of :func:`run` see every stage and what enters the classifier."""
    if anatomy.hooked:
        for index, stage in enumerate(anatomy.stages):
            backbone.get_submodule(stage.module).register_forward_hook(partial(_report, index))
    for classifier in _classifiers(backbone):
        classifier.register_forward_pre_hook(_report_features)


def run(backbone: nn.Module, anatomy: Anatomy, pixel_values: Tensor, visitor: Callable[[int, Any], Any]) -> Tensor:
    """Run the backbone and return its logits; ``visitor(index, output)`` sees each stage as it ends.

    Args:
        backbone: A model that :func:`attach_hooks` was called on.
        anatomy: What :func:`measure` found.
        pixel_values: ``(batch, channels, height, width)``.
        visitor: Called with the stage's index and raw output, and with ``FEATURES`` and what enters the classifier,
            once per classifier. A stage's output is replaced by what it returns, unless that is ``None``.
    """
    previous = getattr(_active, "visitor", None)
    _active.visitor = visitor
    try:
        if anatomy.hooked:
            return backbone(pixel_values)
        final, maps = backbone.forward_intermediates(pixel_values)
        for index, stage_map in enumerate(maps):
            visitor(index, stage_map)
        return backbone.forward_head(final)
    finally:
        _active.visitor = previous


def join_features(features: list[Tensor]) -> Tensor:
    """Join what enters several classifiers: the mean where the widths agree, else side by side."""
    if len(features) == 1:
        return features[0]
    if len({tensor.shape[-1] for tensor in features}) == 1:
        return torch.stack(features).mean(dim=0)
    return torch.cat(features, dim=-1)


def input_shape(backbone: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of the images that the backbone was built for."""
    kwargs = getattr(backbone, "_model_args", {})
    channels, height, width = backbone.pretrained_cfg["input_size"]
    if size := kwargs.get("img_size"):
        height, width = (size, size) if isinstance(size, int) else size
    return kwargs.get("in_chans", channels), height, width


def measure(create: Callable[[], nn.Module]) -> Anatomy:
    """Find out where the stages of a backbone end and what they give.

    Runs a copy on the meta device, which costs neither memory nor arithmetic: timm's ``reduction`` numbers are stale
    after a change of the stem, and the layout of a hook's output is written nowhere.

    Args:
        create: Builds the backbone.
    """
    with torch.device("meta"), torch.no_grad():
        backbone = create().eval()
        channels, *image_size = input_shape(backbone)
        images = torch.empty(2, channels, *image_size)
        modules = dict(backbone.named_modules())
        paths = [_end_of_stage(modules, info["module"]) for info in backbone.feature_info]
        seen: list[list[Any]] = [[] for _ in paths]
        features: list[Tensor] = []
        for index, path in enumerate(paths):
            if path is not None:
                modules[path].register_forward_hook(partial(_collect, seen[index]))
        for classifier in _classifiers(backbone):
            classifier.register_forward_pre_hook(lambda module, args: features.append(args[0].flatten(1)))
        backbone(images)
        outputs = [list(stage) for stage in seen]
        maps = backbone.forward_intermediates(images, intermediates_only=True)
    stages = [
        _describe(path, output, stage_map, tuple(image_size))
        for path, output, stage_map in zip(paths, outputs, maps, strict=True)
    ]
    if not all(stage.module is not None for stage in stages):
        stages = [_describe(None, [], stage_map, tuple(image_size)) for stage_map in maps]
    return Anatomy(tuple(stages), join_features(features).shape[-1])


def _collect(outputs: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    outputs.append(output)


def _end_of_stage(modules: dict[str, nn.Module], path: str) -> str | None:
    """Return the module that ends a stage, or ``None`` if there is no such module.

    With gradient checkpointing timm calls the blocks of a plain sequence and never the sequence itself, so a hook
    must sit on the last block.
    """
    if path not in modules:
        return None
    while type(modules[path]) is nn.Sequential and len(modules[path]):
        path = f"{path}.{next(reversed(modules[path]._modules))}"
    return path


def _describe(path: str | None, outputs: list[Any], stage_map: Tensor, image_size: tuple[int, int]) -> Stage:
    """Tell how the raw output of a hook becomes the map that timm's ``forward_intermediates`` gives."""
    batch, channels, height, width = stage_map.shape
    found = partial(Stage, channels=channels, size=(height, width), image_size=image_size)
    if path is None or len(outputs) != 1:
        return found(None)
    output = outputs[0]
    candidates = enumerate(output) if isinstance(output, (list, tuple)) else [(None, output)]
    for element, tensor in candidates:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.shape == stage_map.shape:
            return found(path, element=element)
        if tensor.shape == (batch, height, width, channels):
            return found(path, layout="NHWC", element=element)
        num_prefix_tokens = tensor.shape[1] - height * width if tensor.dim() == 3 else -1
        if num_prefix_tokens >= 0 and tensor.shape[2] == channels:
            return found(path, layout="NLC", num_prefix_tokens=num_prefix_tokens, element=element)
    return found(None)


def default_exits(stages: tuple[Stage, ...]) -> list[int]:
    """Choose stages for exits, see :class:`MultiExitConfig`."""
    sizes = [stage.size for stage in stages]
    last_of = {size: index for index, size in enumerate(sizes)}
    if len(last_of) == 1:
        return sorted({max(0, round(len(stages) * quarter / 4) - 1) for quarter in (1, 2, 3)} - {len(stages) - 1})
    return sorted(index for size, index in last_of.items() if size != sizes[-1])[-3:]
