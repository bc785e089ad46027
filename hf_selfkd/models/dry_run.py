"""A dry run on the meta device: where the stages of a backbone end and what they return."""

from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from .hooks import Visitor, attach_hooks, join_features, run
from .stages import Anatomy, Stage
from .timm_quirks import PATCH_GRIDS, RESIZING, STAGE_ENDS, copy_to_meta


def input_shape(backbone: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of the images that the backbone was built for."""
    kwargs = getattr(backbone, "_model_args", {})
    channels, height, width = backbone.pretrained_cfg["input_size"]
    if size := kwargs.get("img_size"):
        height, width = to_2tuple(size)
    return kwargs.get("in_chans", channels), height, width


class _Record(Visitor):
    """Records the order in which stages end, and all outputs of each: some end more than once."""

    def __init__(self, num_stages: int):
        self.order: list[int] = []
        self.outputs: list[list[Any]] = [[] for _ in range(num_stages)]
        self.features: list[Tensor] = []

    def on_stage(self, index: int, output: Any) -> None:
        self.order.append(index)
        self.outputs[index].append(output)

    def on_features(self, features: Tensor) -> None:
        self.features.append(features)


def measure(backbone: nn.Module) -> Anatomy:
    """Measure where the stages of a backbone end, and the sizes and layouts of their outputs.

    Runs a copy on the meta device, which takes neither memory nor arithmetic: timm's ``reduction`` numbers are stale
    after a change of the stem, and the layout of a module's output is not documented.

    Args:
        backbone: A timm model with ``feature_info`` and a classifier, on any device; it is not changed.

    Raises:
        ValueError: If the backbone cannot run, or does not return logits ``(batch, classes)``.
    """
    twin = copy_to_meta(backbone).eval()
    channels, *image_size = input_shape(twin)
    paths = [_end_of_stage(twin, info["module"]) for info in twin.feature_info]
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(2, channels, *image_size, dtype=next(twin.parameters()).dtype)
        seen = _run_recorded(twin, paths, images)
        feature_maps = _feature_maps(twin, images)
    size = None if type(twin).__name__ in RESIZING else tuple(image_size)
    stages = choose_layouts(paths, seen.outputs, feature_maps, size)
    return Anatomy(tuple(stages), join_features(seen.features).shape[-1], seen.order == sorted(seen.order))


def _run_recorded(backbone: nn.Module, paths: list[str | None], images: Tensor) -> _Record:
    """Run the backbone, check its logits, and return what its stages and classifiers reported."""
    attach_hooks(backbone, paths)
    seen = _Record(len(paths))
    try:
        logits = run(backbone, Anatomy((), 0), images, seen)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{type(backbone).__name__} cannot run on images of shape {tuple(images.shape[1:])}: {error} If "
            "small_input_stem is set, its later layers are built for its own stem: leave it at False."
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, backbone.num_classes) or not seen.features:
        raise ValueError(
            f"A backbone must return the logits (batch, {backbone.num_classes}) of its classifier, but "
            f"{type(backbone).__name__} returns {getattr(logits, 'shape', type(logits))}. Leave global_pool at its "
            "default."
        )
    return seen


def choose_layouts(
    paths: list[str | None],
    outputs: list[list[Any]],
    feature_maps: list[Tensor],
    image_size: tuple[int, int] | None,
) -> list[Stage]:
    """Decide how the raw output of each stage is read as the feature map that timm returns for it.

    Where channels, height and width agree, an output fits two layouts; then the stages with one layout decide. If
    a stage stays undecided, all are left to ``forward_intermediates``.

    Args:
        paths: Path of the module that ends each stage.
        outputs: All raw outputs of each.
        feature_maps: timm's own, each ``(batch, channels, height, width)``.
        image_size: Height and width of the images.
    """
    fits = [_fits(*stage, image_size) for stage in zip(paths, outputs, feature_maps, strict=True)]
    certain = {stages[0].layout for stages in fits if len({stage.layout for stage in stages}) == 1}
    chosen = [next((stage for stage in stages if stage.layout in certain), None) for stages in fits]
    if None in chosen:
        return [Stage(None, level.shape[1], tuple(level.shape[2:]), image_size) for level in feature_maps]
    return chosen


def _end_of_stage(backbone: nn.Module, path: str) -> str | None:
    """Return the path of the module that ends a stage, or ``None`` if there is no such module.

    Lists of blocks are never called, nor are plain sequences under gradient checkpointing: the hook must sit on their
    last block.
    """
    modules = dict(backbone.named_modules())
    first, dot, rest = path.partition(".")
    path = STAGE_ENDS.get(type(backbone).__name__, {}).get(first, first) + dot + rest
    if path not in modules:
        return None
    while type(modules[path]) in (nn.Sequential, nn.ModuleList) and len(modules[path]):
        *_, (last, _) = modules[path].named_children()
        path = f"{path}.{last}"
    return path


def _feature_maps(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Return timm's own feature maps of all stages."""
    if type(backbone).__name__ not in PATCH_GRIDS:
        return backbone.forward_intermediates(images, intermediates_only=True)
    grid = [side // patch for side, patch in zip(images.shape[2:], backbone.patch_size, strict=True)]
    return [images.new_empty(len(images), info["num_chs"], *grid) for info in backbone.feature_info]


def _fits(
    path: str | None, outputs: list[Any], feature_map: Tensor, image_size: tuple[int, int] | None
) -> list[Stage]:
    """List the ways in which the only output of a stage can be read as its feature map, best first."""
    if len(outputs) != 1:
        return []
    output = outputs[0]
    batch, channels, height, width = feature_map.shape
    found = partial(Stage, path, channels, (height, width), image_size)
    fits = []
    for element, tensor in enumerate(output) if isinstance(output, (list, tuple)) else [(None, output)]:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.shape == feature_map.shape:
            fits.append(found(element=element))
        if tensor.shape == (batch, height, width, channels):
            fits.append(found(layout="NHWC", element=element))
        if tensor.dim() == 3 and tensor.shape[1] >= height * width and tensor.shape[2] == channels:
            num_prefix_tokens = tensor.shape[1] - height * width
            fits.append(found(layout="NLC", num_prefix_tokens=num_prefix_tokens, element=element))
    return sorted(fits, key=lambda stage: stage.num_prefix_tokens)
