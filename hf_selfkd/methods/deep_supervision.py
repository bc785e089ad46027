"""Deep supervision: every exit learns from the labels alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..models.outputs import MultiExitOutput
from .base import Method


@dataclass(frozen=True, kw_only=True)
class DeepSupervision(Method):
    """Deeply-Supervised Nets (Lee et al., AISTATS 2015): https://arxiv.org/abs/1409.5185.

    All exits have the same, constant weight, as in the ablations of BYOT and EED; the paper decays its companion
    losses.
    """

    name: ClassVar[str] = "deep_supervision"
    paper: ClassVar[str] = "https://arxiv.org/abs/1409.5185"
    min_exits: ClassVar[int] = 2
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification", "image-segmentation")

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, the sum of the label losses of all exits."""
        return {"label": output.label_loss(output.exit_logits, labels)}
