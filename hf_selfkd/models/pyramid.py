"""Bidirectional feature pyramids: maps of several resolutions refine one another, top-down and then bottom-up.

For dense prediction, where layers are stacked under a head, and for the self-teacher of FRSKD. It is the layer of
EfficientDet (Tan et al., CVPR 2020, https://arxiv.org/abs/1911.09070, section 3) in the form that FRSKD gives it (Ji
et al., CVPR 2021, https://arxiv.org/abs/2103.08273, section 3.1): separate lateral convolutions for both directions,
and widths that may differ from level to level. Maps leave every layer non-negative.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import SegmentationHead


class BiFPN(nn.Module):
    """One layer: every level learns from the deeper levels, then from the shallower ones.

    Constant widths and no ``channels`` make the layers of a stack behind the first; widths that follow the channels
    make the paper's self-teacher, BiFPNc. With the maps ``F`` that come in, shallow to deep from 1 to n:

    ``P_n = A_n(F_n)``, ``P_i = node(A_i(F_i), P_{i+1})``, then ``T_1 = P_1``, ``T_i = node(B_i(F_i), P_i, T_{i-1})``,
    ``T_n = node(B_n(F_n), T_{n-1})``. The paper's ReLU on ``F`` is left out: it changes nothing where maps are
    non-negative, as those of a ResNet are, and elsewhere would throw half of the map away.

    Args:
        widths: Channels of the maps that leave, shallow to deep.
        channels: Channels of the maps that come in, which two 1x1 convolutions per level (one at the shallowest)
            bring to ``widths``; ``None`` for non-negative maps that have the widths already.
        eps: Of the batch norms. Levels of few pixels, whose variance may be next to zero, need EfficientDet's 1e-3.
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

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Refine maps ``(batch, channels, height, width)``, shallow to deep; their sizes stay.

        Neighbouring levels may have any sizes, equal ones included.
        """
        refined = [lateral(level) for lateral, level in zip(self.down_laterals, maps, strict=True)]
        for index in reversed(range(len(refined) - 1)):
            refined[index] = self.down_nodes[index](refined[index + 1], refined[index])
        laterals = [lateral(level) for lateral, level in zip(self.up_laterals, maps[1:], strict=True)]
        for index, lateral in enumerate(laterals, start=1):
            # What came down to the deepest level is its own lateral map, so it enters once.
            own = [lateral] if index == len(laterals) else [lateral, refined[index]]
            refined[index] = self.up_nodes[index - 1](refined[index - 1], *own)
        return tuple(refined)


class Node(nn.Module):
    """Where maps of one level and of a neighbouring level meet: resize, fuse, refine.

    Args:
        width: Channels of the level.
        neighbour_width: Channels of the neighbour; a 1x1 convolution brings them to ``width`` where they differ.
        num_inputs: Maps that are fused, the neighbour's included.
        eps: Of the batch norms.
    """

    def __init__(self, width: int, neighbour_width: int, num_inputs: int, eps: float):
        super().__init__()
        self.project = nn.Identity() if neighbour_width == width else conv_bn_relu(neighbour_width, width, eps)
        self.fusion_weight = nn.Parameter(torch.ones(num_inputs))
        self.refine = nn.Sequential(*_separable(width, eps), *_separable(width, eps))

    def forward(self, neighbour: Tensor, *own: Tensor) -> Tensor:
        """Return ``refine(sum_k w_k map_k)`` at the size of ``own``, the neighbour's map being the last."""
        size = own[0].shape[-2:]
        if neighbour.shape[-2:].numel() < size.numel():
            # The paper projects behind the enlargement. Both commute, and here it costs a quarter.
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
        channels: Channels of the maps that come in, see :class:`BiFPN`.
    """

    def __init__(self, width: int, num_levels: int, num_layers: int, channels: Sequence[int] | None = None):
        widths = [width] * num_levels
        super().__init__(*(BiFPN(widths, None if layer else channels, eps=1e-3) for layer in range(num_layers)))


class PyramidHead(nn.Module):
    """Logits for every pixel of the finest of several maps.

    The authors' head reads the finest map alone, which the bottom-up half of the layer below does not reach: that half
    would learn nothing in the student, and what the self-teacher shows at the deeper levels would stay random. So all
    levels are enlarged to the finest and fused here, by weights that are learned.

    Args:
        channels: Channels of every map. In between there are four times as many, as in the paper (64 and 256).
        num_levels: Number of maps.
        num_labels: Number of classes.
    """

    def __init__(self, channels: int, num_levels: int, num_labels: int):
        super().__init__()
        self.fusion_weight = nn.Parameter(torch.ones(num_levels))
        self.head = SegmentationHead(channels, 4 * channels, num_labels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps ``(batch, channels, height, width)``, shallow to deep, into logits of the finest one's size."""
        size = maps[0].shape[-2:]
        enlarged = [F.interpolate(level, size=size, mode="bilinear", align_corners=False) for level in maps]
        return self.head(fuse(enlarged, self.fusion_weight))


def fuse(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Add maps up with shares ``relu(w) / (sum relu(w) + 1e-6)`` (EfficientDet, section 3.3, fast normalised fusion).

    Args:
        maps: All shaped alike.
        weight: ``(maps,)``, raw; a negative one leaves its map out.
    """
    weight = F.relu(weight)
    shares = weight / (weight.sum() + 1e-6)
    return sum(share * level for share, level in zip(shares.unbind(), maps, strict=True))


def resize(level: Tensor, size: Sequence[int]) -> Tensor:
    """Bring a map ``(batch, channels, height, width)`` to another size.

    Nearest neighbours enlarge it, as in the authors' code. To half the size (rounded up) it shrinks by 3x3 max-pooling
    with stride 2, padded at bottom and right first, as theirs; to any other size by adaptive max-pooling.
    """
    height, width = level.shape[-2:]
    if (height, width) == tuple(size):
        return level
    if height <= size[0] and width <= size[1]:
        return F.interpolate(level, size=tuple(size))
    if tuple(size) == ((height + 1) // 2, (width + 1) // 2):
        # An odd side is padded on both ends, an even one behind its end only: what ceil_mode does.
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
