"""Bidirectional feature pyramids: feature maps of several resolutions refine one another, top-down, then bottom-up.

For dense prediction, where layers are stacked under a head, and for the self-teacher of FRSKD. It is the layer of
EfficientDet (Tan et al., CVPR 2020, https://arxiv.org/abs/1911.09070, section 3) in the form that FRSKD gives it (Ji
et al., CVPR 2021, https://arxiv.org/abs/2103.08273, section 3.1): separate lateral convolutions for both directions,
and widths that may differ from level to level. The output of every layer is non-negative.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import SegmentationHead


class BiFPN(nn.Module):
    """One layer: every level is fused with the levels below it, then with those above it.

    With constant widths and no ``channels`` it is a later layer of a stack; with widths that follow the channels it is
    the paper's self-teacher, BiFPNc. For input feature maps ``F``, first to last from 1 to n:

    ``P_n = A_n(F_n)``, ``P_i = node(A_i(F_i), P_{i+1})``, then ``T_1 = P_1``, ``T_i = node(B_i(F_i), P_i, T_{i-1})``,
    ``T_n = node(B_n(F_n), T_{n-1})``. The paper's ReLU on ``F`` is left out: it changes nothing where feature
    maps are non-negative, as those of a ResNet are, and would discard half of the values elsewhere.

    Args:
        widths: Channels of the output feature maps, first to last.
        channels: Channels of the input feature maps, which two 1x1 convolutions per level (one at the first)
            project to ``widths``; ``None`` for non-negative inputs that already have these widths.
        eps: Epsilon of the batch norms. Levels of few pixels, whose variance may be close to zero, need EfficientDet's
            1e-3.
    """

    def __init__(self, widths: Sequence[int], channels: Sequence[int] | None = None, *, eps: float = 1e-5):
        super().__init__()
        levels = range(len(widths))
        last = len(widths) - 1
        self.down_laterals = nn.ModuleList(_lateral(channels, widths, level, eps) for level in levels)
        self.up_laterals = nn.ModuleList(_lateral(channels, widths, level, eps) for level in levels[1:])
        self.down_nodes = nn.ModuleList(Node(widths[i], widths[i + 1], num_inputs=2, eps=eps) for i in levels[:-1])
        self.up_nodes = nn.ModuleList(
            Node(widths[i], widths[i - 1], num_inputs=2 if i == last else 3, eps=eps) for i in levels[1:]
        )

    def forward(self, feature_maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Refine feature maps ``(batch, channels, height, width)``, first to last; their sizes stay.

        Neighbouring levels may have any sizes, equal ones included.
        """
        refined = [lateral(level) for lateral, level in zip(self.down_laterals, feature_maps, strict=True)]
        for index in reversed(range(len(refined) - 1)):
            refined[index] = self.down_nodes[index](refined[index + 1], refined[index])
        laterals = [lateral(level) for lateral, level in zip(self.up_laterals, feature_maps[1:], strict=True)]
        for index, lateral in enumerate(laterals, start=1):
            # The top-down output of the last level is its own lateral feature map, so it is fused once.
            own = [lateral] if index == len(laterals) else [lateral, refined[index]]
            refined[index] = self.up_nodes[index - 1](refined[index - 1], *own)
        return tuple(refined)


class Node(nn.Module):
    """Fusion of the feature maps of one level and of a neighbouring level: resize, fuse, refine.

    Args:
        width: Channels of the level.
        neighbour_width: Channels of the neighbour; a 1x1 convolution projects them to ``width`` where they differ.
        num_inputs: Number of feature maps to fuse, the neighbour's included.
        eps: Epsilon of the batch norms.
    """

    def __init__(self, width: int, neighbour_width: int, num_inputs: int, eps: float):
        super().__init__()
        self.project = nn.Identity() if neighbour_width == width else conv_bn_relu(neighbour_width, width, eps)
        self.fusion_weight = nn.Parameter(torch.ones(num_inputs))
        self.refine = nn.Sequential(*_separable(width, eps), *_separable(width, eps))

    def forward(self, neighbour: Tensor, *own: Tensor) -> Tensor:
        """Return ``refine(sum_k w_k F_k)`` at the size of ``own``; the neighbour's feature map is the last ``F_k``."""
        size = own[0].shape[-2:]
        if neighbour.shape[-2:].numel() < size.numel():
            # The paper projects after upsampling. The two commute, and in this order the projection costs a quarter.
            neighbour = resize(self.project(neighbour), size)
        else:
            neighbour = self.project(resize(neighbour, size))
        return self.refine(fuse((*own, neighbour), self.fusion_weight))


class SegmentationPyramid(nn.Sequential):
    """A stack of layers of constant width, for dense prediction.

    Args:
        width: Channels of every level.
        num_levels: Number of levels.
        num_layers: Number of layers.
        channels: Channels of the input feature maps, see :class:`BiFPN`.
    """

    def __init__(self, width: int, num_levels: int, num_layers: int, channels: Sequence[int] | None = None):
        widths = [width] * num_levels
        super().__init__(*(BiFPN(widths, None if layer else channels, eps=1e-3) for layer in range(num_layers)))


class PyramidHead(nn.Module):
    """Logits for every pixel of the finest of several feature maps.

    The authors' head reads the finest feature map alone, on which the bottom-up half of the last layer has no
    influence: that half would get no gradient in the student, and the deeper levels of the self-teacher would stay
    random. Here all levels are upsampled to the finest and fused with learned weights.

    Args:
        channels: Channels of every feature map. The hidden layer has four times as many, as in the paper (64 and 256).
        num_levels: Number of feature maps.
        num_labels: Number of classes.
    """

    def __init__(self, channels: int, num_levels: int, num_labels: int):
        super().__init__()
        self.fusion_weight = nn.Parameter(torch.ones(num_levels))
        self.head = SegmentationHead(channels, 4 * channels, num_labels)

    def forward(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Map feature maps ``(batch, channels, height, width)``, first to last, to logits of the first one's size."""
        size = feature_maps[0].shape[-2:]
        upsampled = [F.interpolate(level, size=size, mode="bilinear", align_corners=False) for level in feature_maps]
        return self.head(fuse(upsampled, self.fusion_weight))


def fuse(feature_maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Sum feature maps with weights ``relu(w) / (sum relu(w) + 1e-6)``, EfficientDet's fast normalised fusion (3.3).

    Args:
        feature_maps: All of one shape.
        weight: ``(feature maps,)``, raw; a negative weight drops its feature map.
    """
    weight = F.relu(weight)
    shares = weight / (weight.sum() + 1e-6)
    return sum(share * level for share, level in zip(shares.unbind(), feature_maps, strict=True))


def resize(level: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a feature map ``(batch, channels, height, width)``.

    Upsampling takes nearest neighbours, as in the authors' code. Halving (rounded up) is 3x3 max-pooling with stride
    2, padded at bottom and right first, as theirs; any other reduction is adaptive max-pooling.
    """
    height, width = level.shape[-2:]
    if (height, width) == tuple(size):
        return level
    if height <= size[0] and width <= size[1]:
        return F.interpolate(level, size=tuple(size))
    if tuple(size) == ((height + 1) // 2, (width + 1) // 2):
        # An odd side is padded at both ends, an even one at its end only, by ceil_mode.
        return F.max_pool2d(level, 3, stride=2, padding=(height % 2, width % 2), ceil_mode=True)
    return F.adaptive_max_pool2d(level, tuple(size))


def conv_bn_relu(channels: int, width: int, eps: float) -> nn.Sequential:
    """Build a 1x1 convolution from ``channels`` to ``width`` with batch norm and ReLU."""
    norm = nn.BatchNorm2d(width, eps=eps)
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), norm, nn.ReLU(inplace=True))


def _lateral(channels: Sequence[int] | None, widths: Sequence[int], level: int, eps: float) -> nn.Module:
    return nn.Identity() if channels is None else conv_bn_relu(channels[level], widths[level], eps)


def _separable(width: int, eps: float) -> list[nn.Module]:
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    return [depthwise, *conv_bn_relu(width, width, eps)]
