"""Exit heads: the choice of a head for each stage, and the modules that map a feature map to logits and features."""

import torch.nn.functional as F
from torch import Tensor, nn

from .stages import Stage

# With wider bottlenecks the exits of a 2,048-wide backbone would cost more than exiting early saves.
MAX_BOTTLENECK_WIDTH = 128


def create_head(stage: Stage, last: Stage, width: int, num_labels: int) -> nn.Module:
    """Create the exit head for a stage.

    Args:
        stage: The stage whose feature maps the head takes.
        last: The last stage of the backbone.
        width: Width of the pooled features.
        num_labels: Number of classes.

    Returns:
        A module that maps ``(batch, channels, height, width)`` to logits ``(batch, num_labels)`` and features
        ``(batch, width)``.
    """
    if stage.layout == "NLC":
        return TokenExit(stage.channels, width, num_labels)
    stride = max(1, round(stage.size[0] / last.size[0]))
    return ConvExit(stage.channels, width, num_labels, stride)


class ConvExit(nn.Module):
    """Bottleneck, global average pooling and classifier, for feature maps (BYOT, Zhang et al. 2019, figure 2).

    ``1x1 -> kxk with stride k -> 1x1``, each with batch norm and ReLU. ``k`` reduces the feature map to the resolution
    of the backbone's last one; where it is not a power of two up to 8, average pooling replaces the large kernel.

    Args:
        channels: Channels of the stage's feature map.
        width: Width of the pooled features.
        num_labels: Number of classes.
        stride: Side of the stage's feature map divided by that of the last one, at least 1.
    """

    def __init__(self, channels: int, width: int, num_labels: int, stride: int):
        super().__init__()
        inner = max(1, min(width // 4, MAX_BOTTLENECK_WIDTH))
        self.kernel = stride if stride in (1, 2, 4, 8) else 1
        self.pool = nn.Identity() if self.kernel == stride else nn.AvgPool2d(stride, ceil_mode=True)
        self.bottleneck = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, self.kernel, stride=self.kernel),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(batch, channels, height, width)`` to logits ``(batch, classes)`` and features ``(batch, width)``."""
        feature_map = self.pool(feature_map)
        height, width = feature_map.shape[-2:]
        if min(height, width) < self.kernel:  # images far smaller than those the backbone was built for
            feature_map = F.pad(feature_map, (0, max(0, self.kernel - width), 0, max(0, self.kernel - height)))
        features = self.bottleneck(feature_map).mean(dim=(2, 3))
        return self.classifier(features), features


class TokenExit(nn.Module):
    """Layer norm, mean over tokens, two-layer perceptron and classifier, for token sequences.

    Args:
        channels: Width of a token.
        width: Width of the pooled features.
        num_labels: Number of classes.
    """

    def __init__(self, channels: int, width: int, num_labels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(batch, channels, height, width)`` to logits ``(batch, classes)`` and features ``(batch, width)``."""
        tokens = self.norm(feature_map.flatten(2).transpose(1, 2))
        features = self.mlp(tokens.mean(dim=1))
        return self.classifier(features), features


class SegmentationHead(nn.Sequential):
    """Logits for every pixel of a feature map: 3x3 convolution, batch norm, ReLU, 3x3 convolution (FRSKD, 4.3).

    Args:
        channels: Channels of the feature map.
        width: Channels in between.
        num_labels: Number of classes.
    """

    def __init__(self, channels: int, width: int, num_labels: int):
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, num_labels, 3, padding=1),
        )
