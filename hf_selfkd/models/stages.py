"""Stages of a timm model: where each ends, how its output is read as a feature map, and which get an exit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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


def default_exits(stages: tuple[Stage, ...]) -> list[int]:
    """Choose stages for exits, see :class:`MultiExitConfig`."""
    sizes = [stage.size for stage in stages]
    last_of = {size: index for index, size in enumerate(sizes)}
    if len(last_of) == 1:
        return sorted({max(0, round(len(stages) * quarter / 4) - 1) for quarter in (1, 2, 3)} - {len(stages) - 1})
    return sorted(index for size, index in last_of.items() if size != sizes[-1])[-3:]


def deepest_resolutions(sizes: Sequence[tuple[int, int]], limit: int = 4) -> list[int]:
    """List the last stage of each of the deepest resolutions, shallow to deep.

    Args:
        sizes: Height and width of the map of every stage, shallow to deep.
        limit: How many resolutions at most. Four leave out the stem of a ResNet.
    """
    return sorted({size: index for index, size in enumerate(sizes)}.values())[-limit:]
