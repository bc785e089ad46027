"""Stages of a timm model: where each ends, how its output is read as a feature map, and which of them to use."""

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
        channels: Channels of the feature map.
        size: Height and width of the feature map for an image of ``image_size``.
        image_size: Height and width of the image it was measured with; ``None`` if the backbone resizes every image,
            so that the feature map always has this size.
        layout: ``"NCHW"``, ``"NHWC"`` or ``"NLC"`` (tokens).
        num_prefix_tokens: Tokens before those of the feature map, such as a class token.
        element: Index of the feature map in a list or tuple output, ``None`` for a plain tensor.
    """

    module: str | None
    channels: int
    size: tuple[int, int]
    image_size: tuple[int, int] | None
    layout: str = "NCHW"
    num_prefix_tokens: int = 0
    element: int | None = None

    def to_feature_map(self, output: Any, image_size: tuple[int, int]) -> Tensor:
        """View a raw output of the stage as a feature map ``(batch, channels, height, width)``.

        Raises:
            ValueError: If the tokens do not form a grid for images of ``image_size``.
        """
        tensor = output if self.element is None else output[self.element]
        if self.layout == "NCHW":
            return tensor
        if self.layout == "NHWC":
            return tensor.permute(0, 3, 1, 2)
        tokens = tensor[:, self.num_prefix_tokens :].transpose(1, 2)
        # The grid of tokens is not in their shape. It scales with the image, rounded up by backbones that pad the
        # image and down by the others.
        scales = list(zip(image_size, self.size, self.image_size or image_size, strict=True))
        padded = tuple(-(-side * cells // measured) for side, cells, measured in scales)
        cropped = tuple(side * cells // measured for side, cells, measured in scales)
        for grid in (padded, cropped):
            if grid[0] * grid[1] == tokens.shape[2]:
                return tokens.reshape(*tokens.shape[:2], *grid)
        raise ValueError(
            f"A stage returned {tokens.shape[2]} tokens for images of {image_size[0]}x{image_size[1]} pixels, which "
            f"do not form a grid of {padded[0]}x{padded[1]}. Use an image size that the backbone's patch size divides."
        )


@dataclass(frozen=True)
class Anatomy:
    """The structure of a backbone, as a dry run measured it.

    Args:
        stages: Its stages, first to last.
        width: Width of the features that enter the classifier.
        in_order: Whether the stages end in the order of their indices; those of parallel branches (crossvit) do not.
    """

    stages: tuple[Stage, ...]
    width: int
    in_order: bool = True

    @property
    def hooked(self) -> bool:
        """Whether hooks see every stage; otherwise ``forward_intermediates`` is used."""
        return all(stage.module is not None for stage in self.stages)


def choose_stages(stages: Sequence[Stage], *, include_last: bool) -> list[int]:
    """Choose at most four stages, spread over the depth of a backbone.

    Of a hierarchical backbone these are the last stages of its four lowest resolutions (for a ResNet all but the
    stem), of an isotropic one those after each quarter of its stages.

    Args:
        stages: All stages of the backbone, first to last.
        include_last: Whether the last stage is among them, as feature pyramids need it. Exits leave it out, because
            the backbone's own head is there.

    Returns:
        Indices of the stages, increasing.

    Example:
        >>> resnet = [Stage(None, 8, (size, size), (64, 64)) for size in (32, 16, 8, 4, 2)]
        >>> choose_stages(resnet, include_last=True)
        [1, 2, 3, 4]
        >>> choose_stages(resnet, include_last=False)
        [1, 2, 3]
    """
    last_of = {stage.size: index for index, stage in enumerate(stages)}
    if len(last_of) == 1:
        chosen = sorted({max(0, round(len(stages) * quarter / 4) - 1) for quarter in (1, 2, 3, 4)})
    else:
        chosen = sorted(last_of.values())[-4:]
    return chosen if include_last else chosen[:-1]
