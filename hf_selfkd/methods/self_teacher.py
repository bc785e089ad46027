"""A self-teacher: a feature pyramid and a classifier on the network's own feature maps, used only in training."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..models.outputs import MultiExitOutput
from ..models.pyramid import BiFPN, PyramidHead, SegmentationPyramid
from ..models.stages import choose_stages


class SelfTeacher(nn.Module):
    """For classification: BiFPNc and a classifier on its last feature map (FRSKD, section 3.1).

    Args:
        channels: Channels of the stages it reads, first to last.
        stages: Indices of these stages.
        width_multiplier: Width of its levels divided by ``channels``.
        num_labels: Number of classes.
    """

    def __init__(self, channels: Sequence[int], stages: Sequence[int], width_multiplier: float, num_labels: int):
        super().__init__()
        widths = [max(1, round(width_multiplier * width)) for width in channels]
        self.stages = list(stages)
        self.pyramid = BiFPN(widths, channels)
        self.classifier = nn.Linear(widths[-1], num_labels)

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Return ``logits`` ``(batch, classes)``, ``teacher_maps`` and the ``student_maps`` they refine.

        The feature maps are not detached: the gradient of the self-teacher's label loss reaches the backbone.
        """
        student_maps = tuple(output.exit_maps[stage] for stage in self.stages)
        teacher_maps = self.pyramid(student_maps)
        logits = self.classifier(teacher_maps[-1].mean(dim=(2, 3)))
        return {"logits": logits, "teacher_maps": teacher_maps, "student_maps": student_maps}


class SegmentationSelfTeacher(nn.Module):
    """For segmentation: two more layers on the network's own pyramid, and a second head (FRSKD, section 4.3).

    Args:
        width: Channels of the pyramid.
        num_levels: Levels of the pyramid.
        num_labels: Number of classes.
    """

    def __init__(self, width: int, num_levels: int, num_labels: int):
        super().__init__()
        self.pyramid = SegmentationPyramid(width, num_levels, num_layers=2)
        self.head = PyramidHead(width, num_levels, num_labels)

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Return the same as :class:`SelfTeacher`, with ``logits`` ``(batch, classes, height, width)``."""
        teacher_maps = self.pyramid(output.exit_maps)
        height, width = output.logits.shape[-2:]  # the feature maps may be larger, because the image was padded
        logits = self.head(teacher_maps)[..., :height, :width]
        return {"logits": logits, "teacher_maps": teacher_maps, "student_maps": output.exit_maps}


def build_self_teacher(model: nn.Module, width_multiplier: float) -> SelfTeacher | SegmentationSelfTeacher:
    """Build the self-teacher for a multi-exit model.

    Args:
        model: A model for classification or for segmentation.
        width_multiplier: As in :class:`SelfTeacher`; in segmentation the levels are as wide as the pyramid.
    """
    num_labels = model.config.num_labels
    if model.task == "image-segmentation":
        return SegmentationSelfTeacher(model.config.pyramid_width, model.num_levels, num_labels)
    stages = model.anatomy.stages
    levels = choose_stages(stages, include_last=True)
    channels = [stages[level].channels for level in levels]
    return SelfTeacher(channels, levels, width_multiplier, num_labels)
