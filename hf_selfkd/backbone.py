"""Stages of a timm model: where they end, what they give, and hooks that listen there.

A forward hook sits where each stage of ``feature_info`` ends. During a call of :func:`run` it hands what the stage
gives to that call's visitor, which may answer with a replacement (early exit: with fewer rows); else it does nothing.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn

# Index under which a visitor gets what enters the classifier, the stages being 0, 1, 2, ...
FEATURES = -1

# Where feature_info names modules that do not exist or do not end the stage: first part of the name -> what ends it.
_STAGE_ENDS = {
    "Gemma4VitClassifier": {"blocks": "encoder.blocks"},
    "Hiera": {"blocks": "none"},  # its tokens lie in mask units, and only forward_intermediates puts them in rows
    "HighResolutionNet": {"stem": "act1"} | {f"stage{scale + 1}": f"incre_modules.{scale}" for scale in range(4)},
    "MobileNetV5": {"bn1": "conv_stem"},
    "MultiScaleVit": {"block": "stages"},
    "TResNet": {"": "body.conv1"},
    "Twins": {"block": "blocks"},
}

# Classes whose forward_intermediates reads values, which the meta device has not: their maps are the grid of patches.
_PATCH_GRIDS = {"Gemma4VitClassifier"}

# Classes that resize every image to the size they were built for.
_RESIZING = {"CrossVit"}

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
        image_size: Height and width of the image it was measured with; ``None`` if the map is the same for all images.
        layout: ``"NCHW"``, ``"NHWC"`` or ``"NLC"`` (tokens).
        num_prefix_tokens: Tokens before those of the map, such as a class token.
        element: Which element of a list or tuple output is the map, ``None`` for a plain tensor.
    """

    module: str | None
    channels: int
    size: tuple[int, int]
    image_size: tuple[int, int] | None
    layout: str = "NCHW"
    num_prefix_tokens: int = 0
    element: int | None = None

    def to_map(self, output: Any, image_size: tuple[int, int]) -> Tensor:
        """View a raw output of the stage as a map ``(batch, channels, height, width)``.

        Raises:
            ValueError: If the tokens are no grid that ``image_size`` explains.
        """
        tensor = output if self.element is None else output[self.element]
        if self.layout == "NCHW":
            return tensor
        if self.layout == "NHWC":
            return tensor.permute(0, 3, 1, 2)
        tokens = tensor[:, self.num_prefix_tokens :].transpose(1, 2)
        # Tokens do not know their grid: it scales with the image, rounded up by backbones that pad it, else down.
        scales = list(zip(image_size, self.size, self.image_size or image_size, strict=True))
        padded = tuple(-(-side * cells // measured) for side, cells, measured in scales)
        cropped = tuple(side * cells // measured for side, cells, measured in scales)
        for grid in (padded, cropped):
            if grid[0] * grid[1] == tokens.shape[2]:
                return tokens.reshape(*tokens.shape[:2], *grid)
        raise ValueError(
            f"A stage gave {tokens.shape[2]} tokens for images of {image_size[0]}x{image_size[1]} pixels, which are "
            f"no grid of {padded[0]}x{padded[1]}. Use a size that the backbone's patches divide."
        )


@dataclass(frozen=True)
class Anatomy:
    """What a dry run found out about a backbone.

    Args:
        stages: Its stages, shallow to deep.
        width: Width of what enters the classifier.
        in_order: Whether the stages end in their order; those of parallel branches (crossvit) do not.
    """

    stages: tuple[Stage, ...]
    width: int
    in_order: bool = True

    @property
    def hooked(self) -> bool:
        """Whether hooks see every stage; otherwise ``forward_intermediates`` is used."""
        return all(stage.module is not None for stage in self.stages)


def classifiers(backbone: nn.Module) -> list[nn.Module]:
    """List the modules whose inputs are the pre-logits: several for distilled and multi-branch models."""
    classifiers = backbone.get_classifier()
    if isinstance(classifiers, tuple) and isinstance(classifiers[0], nn.ModuleList):
        classifiers = classifiers[0]  # distilled and of several branches: the second list reads what the first reads
    if not isinstance(classifiers, (tuple, list, nn.ModuleList)):
        classifiers = [classifiers]
    return [_last_layer(classifier) for classifier in classifiers]


def _last_layer(classifier: nn.Module) -> nn.Module:
    if isinstance(classifier, ClassifierHead):  # some models give the whole head, with its pooling
        return classifier.fc
    return classifier[-1] if isinstance(classifier, nn.Sequential) else classifier  # made by _project_features


def _report(index: int, module: nn.Module, args: Any, output: Any) -> Any:
    visitor = getattr(_active, "visitor", None)
    return None if visitor is None else visitor(index, output)


def _report_features(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    visitor = getattr(_active, "visitor", None)
    if visitor is not None:
        # Attention pooling (resnet50_clip) classifies all tokens and then takes the first.
        visitor(FEATURES, args[0][:, 0] if args[0].dim() == 3 else args[0].flatten(1))


def attach_hooks(backbone: nn.Module, anatomy: Anatomy) -> None:
    """Let the visitor of :func:`run` see every stage and what enters the classifier."""
    _listen(backbone, [stage.module for stage in anatomy.stages])


def _listen(backbone: nn.Module, paths: list[str | None]) -> None:
    for index, path in enumerate(paths):
        if path is not None:
            backbone.get_submodule(path).register_forward_hook(partial(_report, index))
    for classifier in classifiers(backbone):
        classifier.register_forward_pre_hook(_report_features)


def run(backbone: nn.Module, anatomy: Anatomy, pixel_values: Tensor, visitor: Callable[[int, Any], Any]) -> Tensor:
    """Run the backbone and return its logits; ``visitor(index, output)`` sees each stage as it ends.

    Args:
        backbone: A model that :func:`attach_hooks` was called on.
        anatomy: What :func:`measure` found.
        pixel_values: ``(batch, channels, height, width)``.
        visitor: Called with the stage's index and raw output, and with ``FEATURES`` and what enters the classifier,
            once per classifier. A stage's output is replaced by what it returns, unless that is ``None`` or the
            anatomy is not ``hooked``.
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


def keep_rows(output: Any, rows: Tensor, batch_size: int) -> Any:
    """Keep the ``rows`` of every tensor in a stage's raw output; one may hold several rows per image (tnt)."""
    if isinstance(output, (list, tuple)):
        return type(output)(keep_rows(item, rows, batch_size) for item in output)
    if not isinstance(output, Tensor):
        return output  # the size of the map (mvitv2)
    return output.unflatten(0, (batch_size, -1))[rows].flatten(0, 1)


def join_rows(outputs: list[Any]) -> Any:
    """Join what a stage gave for parts of a batch."""
    first = outputs[0]
    if isinstance(first, (list, tuple)):
        return type(first)(join_rows(list(items)) for items in zip(*outputs, strict=True))
    return torch.cat(outputs) if isinstance(first, Tensor) else first


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

    Raises:
        ValueError: If the backbone cannot run, or does not answer with one row of classes per image.
    """
    seen: list[tuple[int, Any]] = []
    with torch.device("meta"), torch.no_grad():
        backbone = create().eval()
        channels, *image_size = input_shape(backbone)
        images = torch.empty(2, channels, *image_size)
        paths = [_end_of_stage(backbone, info["module"]) for info in backbone.feature_info]
        _listen(backbone, paths)
        try:
            logits = run(backbone, Anatomy((), 0), images, lambda index, output: seen.append((index, output)))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{type(backbone).__name__} cannot run on images shaped {tuple(images.shape[1:])}: {error} If it was "
                "given small_input_stem, its later layers are sized for its own stem: leave that at False."
            ) from error
        maps = _maps(backbone, images)
    features = [output for index, output in seen if index == FEATURES]
    if not isinstance(logits, Tensor) or logits.shape != (2, backbone.num_classes) or not features:
        raise ValueError(
            f"A backbone must answer with logits (batch, {backbone.num_classes}) of its classifier, but "
            f"{type(backbone).__name__} gives {getattr(logits, 'shape', type(logits))}. Leave global_pool as it is."
        )
    size = None if type(backbone).__name__ in _RESIZING else tuple(image_size)
    outputs = [[output for seen_index, output in seen if seen_index == index] for index in range(len(paths))]
    fits = [_fits(*stage, size) for stage in zip(paths, outputs, maps, strict=True)]
    # Where channels, height and width agree a map fits two layouts: the other stages tell which it is.
    layouts = {stages[0].layout for stages in fits if len({stage.layout for stage in stages}) == 1}
    stages = [next((stage for stage in stages if stage.layout in layouts), None) for stages in fits]
    if None in stages:
        stages = [Stage(None, stage_map.shape[1], tuple(stage_map.shape[2:]), size) for stage_map in maps]
    order = [index for index, _ in seen if index != FEATURES]
    return Anatomy(tuple(stages), join_features(features).shape[-1], order == sorted(order))


def _end_of_stage(backbone: nn.Module, path: str) -> str | None:
    """Return the module that ends a stage, or ``None`` if there is no such module.

    Lists of blocks are never called, nor are plain sequences under gradient checkpointing: a hook must sit on their
    last block.
    """
    modules = dict(backbone.named_modules())
    first, dot, rest = path.partition(".")
    path = _STAGE_ENDS.get(type(backbone).__name__, {}).get(first, first) + dot + rest
    if path not in modules:
        return None
    while type(modules[path]) in (nn.Sequential, nn.ModuleList) and len(modules[path]):
        path = f"{path}.{next(reversed(modules[path]._modules))}"
    return path


def _maps(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Return timm's own maps of all stages."""
    if type(backbone).__name__ not in _PATCH_GRIDS:
        return backbone.forward_intermediates(images, intermediates_only=True)
    grid = [side // patch for side, patch in zip(images.shape[2:], backbone.patch_size, strict=True)]
    return [images.new_empty(len(images), info["num_chs"], *grid) for info in backbone.feature_info]


def _fits(path: str | None, outputs: list[Any], stage_map: Tensor, image_size: tuple[int, int] | None) -> list[Stage]:
    """List how the output that a hook saw can be the map that ``forward_intermediates`` gives, best first."""
    if len(outputs) != 1:
        return []
    output = outputs[0]
    batch, channels, height, width = stage_map.shape
    found = partial(Stage, path, channels, (height, width), image_size)
    fits = []
    for element, tensor in enumerate(output) if isinstance(output, (list, tuple)) else [(None, output)]:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.shape == stage_map.shape:
            fits.append(found(element=element))
        if tensor.shape == (batch, height, width, channels):
            fits.append(found(layout="NHWC", element=element))
        if tensor.dim() == 3 and tensor.shape[1] >= height * width and tensor.shape[2] == channels:
            num_prefix_tokens = tensor.shape[1] - height * width
            fits.append(found(layout="NLC", num_prefix_tokens=num_prefix_tokens, element=element))
    return sorted(fits, key=lambda stage: stage.num_prefix_tokens)


def default_exits(stages: tuple[Stage, ...]) -> list[int]:
    """Choose stages for exits, see :class:`MultiExitConfig`."""
    sizes = [stage.size for stage in stages]
    last_of = {size: index for index, size in enumerate(sizes)}
    if len(last_of) == 1:
        return sorted({max(0, round(len(stages) * quarter / 4) - 1) for quarter in (1, 2, 3)} - {len(stages) - 1})
    return sorted(index for size, index in last_of.items() if size != sizes[-1])[-3:]
