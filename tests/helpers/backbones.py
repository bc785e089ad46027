"""Backbones with hooks, for tests below the models."""

from torch import nn

from hf_selfkd.models.dry_run import measure
from hf_selfkd.models.hooks import attach_hooks
from hf_selfkd.models.timm_factory import create_backbone


def build_hooked(name, **kwargs):
    """Build a timm model with five classes, measure it and attach the hooks."""
    return hooked(create_backbone(name, num_classes=5, small_input_stem=False, exit_width=None, **kwargs))


def hooked(backbone):
    """Measure a backbone and attach the hooks; return both."""
    anatomy = measure(backbone.eval())
    attach_hooks(backbone, [stage.module for stage in anatomy.stages])
    return backbone, anatomy


class Misnamed(nn.Module):
    """A network whose feature_info names no module, as a model that a user registers with timm may."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 4, stride=4), nn.Conv2d(16, 16, 1)
        self.num_classes = num_classes
        self.fc = nn.Linear(16, num_classes)
        self.feature_info = [{"module": "stem"}, {"module": "body"}]
        self.pretrained_cfg = {"input_size": (3, 64, 64)}

    def get_classifier(self):
        return self.fc

    def forward_intermediates(self, x, intermediates_only=False):
        maps = [self.conv1(x)]
        maps.append(self.conv2(maps[0]))
        return maps if intermediates_only else (maps[-1], maps)

    def forward_head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_intermediates(x)[0])
