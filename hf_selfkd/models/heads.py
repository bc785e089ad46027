"""Exit heads: the map of a stage in, logits and pooled features out."""

import torch.nn.functional as F
from torch import Tensor, nn

# A wider bottleneck would cost a 2,048-wide backbone more than leaving early saves.
MAX_BOTTLENECK_WIDTH = 128


class ConvExit(nn.Module):
    """Bottleneck, global average pooling and classifier, for feature maps (BYOT, Zhang et al. 2019, figure 2).

    ``1x1 -> kxk with stride k -> 1x1``, each with batch norm and ReLU. ``k`` brings the map to the resolution of the
    backbone's last one; where it is no power of two up to 8, average pooling does that instead of a large kernel.

    Args:
        channels: Channels of the stage's map.
        width: Width of the pooled features.
        num_labels: Number of classes.
        stride: Side of the stage's map over that of the last one, 1 or more.
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

    def forward(self, stage_map: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(batch, channels, height, width)`` to logits ``(batch, classes)`` and features ``(batch, width)``."""
        stage_map = self.pool(stage_map)
        height, width = stage_map.shape[-2:]
        if min(height, width) < self.kernel:  # images far smaller than the backbone is meant for
            stage_map = F.pad(stage_map, (0, max(0, self.kernel - width), 0, max(0, self.kernel - height)))
        features = self.bottleneck(stage_map).mean(dim=(2, 3))
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

    def forward(self, stage_map: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(batch, channels, height, width)`` to logits ``(batch, classes)`` and features ``(batch, width)``."""
        tokens = self.norm(stage_map.flatten(2).transpose(1, 2))
        features = self.mlp(tokens.mean(dim=1))
        return self.classifier(features), features


class SegmentationHead(nn.Sequential):
    """Logits for every pixel of a map: 3x3 convolution, batch norm, ReLU, 3x3 convolution (FRSKD, section 4.3).

    Args:
        channels: Channels of the map.
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
