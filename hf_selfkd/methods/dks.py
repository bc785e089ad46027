"""Deeply-supervised Knowledge Synergy: every exit learns from the labels and from every other exit."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..functional import add
from ..models.outputs import MultiExitOutput
from .base import Method, check_range, divergence_of


@dataclass(frozen=True, kw_only=True)
class DKS(Method):
    """Deeply-supervised Knowledge Synergy (Sun et al., CVPR 2019): https://arxiv.org/abs/1906.00675.

    The knowledge is matched in both directions between all pairs of exits; each is a detached target for the others.

    Args:
        synergy_weight: Weight of the divergence of each pair, at least 0; 1 in the authors' code.
        temperature: Softens both sets of logits, above 0; its square multiplies the divergence. The authors do not
            soften.
    """

    name: ClassVar[str] = "dks"
    paper: ClassVar[str] = "https://arxiv.org/abs/1906.00675"
    min_exits: ClassVar[int] = 2
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification")

    synergy_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        check_range(self, "synergy_weight", 0)
        check_range(self, "temperature", 0, strict=True)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, summed over exits, and ``synergy``, summed over ordered pairs of exits."""
        exits = output.exit_logits
        synergy = add(
            divergence_of(output)(exits[:teacher] + exits[teacher + 1 :], exits[teacher], self.temperature)
            for teacher in range(len(exits))
        )
        return {"label": output.label_loss(exits, labels), "synergy": self.synergy_weight * synergy}
