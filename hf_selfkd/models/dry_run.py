"""A dry run on the meta device: finds out where the stages of a backbone end and what they give."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Visitor, _listen, join_features, run
from .stages import Anatomy, Stage
from .timm_quirks import _PATCH_GRIDS, _RESIZING, _STAGE_ENDS


def input_shape(backbone: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of the images that the backbone was built for."""
    kwargs = getattr(backbone, "_model_args", {})
    channels, height, width = backbone.pretrained_cfg["input_size"]
    if size := kwargs.get("img_size"):
        height, width = (size, size) if isinstance(size, int) else size
    return kwargs.get("in_chans", channels), height, width


class _Record(Visitor):
    """Notes in which order stages end, and all that they give: some end more than once."""

    def __init__(self, num_stages: int):
        self.order: list[int] = []
        self.outputs: list[list[Any]] = [[] for _ in range(num_stages)]
        self.features: list[Tensor] = []

    def on_stage(self, index: int, output: Any) -> None:
        self.order.append(index)
        self.outputs[index].append(output)

    def on_features(self, features: Tensor) -> None:
        self.features.append(features)


def measure(create: Callable[[], nn.Module]) -> Anatomy:
    """Find out where the stages of a backbone end and what they give.

    Runs a copy on the meta device, which costs neither memory nor arithmetic: timm's ``reduction`` numbers are stale
    after a change of the stem, and the layout of a hook's output is written nowhere.

    Args:
        create: Builds the backbone.

    Raises:
        ValueError: If the backbone cannot run, or does not answer with one row of classes per image.
    """
    with torch.device("meta"), torch.no_grad():
        backbone = create().eval()
        channels, *image_size = input_shape(backbone)
        images = torch.empty(2, channels, *image_size)
        paths = [_end_of_stage(backbone, info["module"]) for info in backbone.feature_info]
        _listen(backbone, paths)
        seen = _Record(len(paths))
        try:
            logits = run(backbone, Anatomy((), 0), images, seen)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{type(backbone).__name__} cannot run on images shaped {tuple(images.shape[1:])}: {error} If it was "
                "given small_input_stem, its later layers are sized for its own stem: leave that at False."
            ) from error
        maps = _maps(backbone, images)
    if not isinstance(logits, Tensor) or logits.shape != (2, backbone.num_classes) or not seen.features:
        raise ValueError(
            f"A backbone must answer with logits (batch, {backbone.num_classes}) of its classifier, but "
            f"{type(backbone).__name__} gives {getattr(logits, 'shape', type(logits))}. Leave global_pool as it is."
        )
    size = None if type(backbone).__name__ in _RESIZING else tuple(image_size)
    fits = [_fits(*stage, size) for stage in zip(paths, seen.outputs, maps, strict=True)]
    # Where channels, height and width agree a map fits two layouts: the other stages tell which it is.
    layouts = {stages[0].layout for stages in fits if len({stage.layout for stage in stages}) == 1}
    stages = [next((stage for stage in stages if stage.layout in layouts), None) for stages in fits]
    if None in stages:
        stages = [Stage(None, stage_map.shape[1], tuple(stage_map.shape[2:]), size) for stage_map in maps]
    return Anatomy(tuple(stages), join_features(seen.features).shape[-1], seen.order == sorted(seen.order))


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
