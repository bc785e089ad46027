"""No distillation: the label loss of the final exit alone, the baseline."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..models.outputs import MultiExitOutput
from .base import Method


@dataclass(frozen=True, kw_only=True)
class NoDistillation(Method):
    """The plain network. Its exits, if any, learn from detached feature maps and do not influence the backbone."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "https://arxiv.org/abs/1512.03385"
    detach_exits: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification", "image-segmentation")

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, the label loss of the final exit."""
        return {"label": output.label_loss(output.exit_logits[-1], labels)}
