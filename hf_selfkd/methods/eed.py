"""Exit-Ensemble Distillation: the mean of all exits teaches every exit, the final exit included."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..functional import add, mse
from ..models.outputs import MultiExitOutput
from .base import Method, check_range, divergence_of


@dataclass(frozen=True, kw_only=True)
class EED(Method):
    """Students are the Best Teacher (Lee & Lee 2021): https://arxiv.org/abs/2104.00299.

    Args:
        output_loss: ``"mse"`` on raw logits, the authors' default, or ``"kl"`` on softened ones. A constant added to
            all logits of an image changes the first, not the second.
        output_weight: Weight of that loss, at least 0; ``None`` is the authors': 1 for ``"mse"``, 0.1 for ``"kl"``.
        feature_weight: Weight of the mean squared error between features, at least 0.
        temperature: Softens both sets of logits for ``"kl"``, above 0.
    """

    name: ClassVar[str] = "eed"
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.00299"
    min_exits: ClassVar[int] = 2
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification")

    output_loss: str = "mse"
    output_weight: float | None = None
    feature_weight: float = 1.0
    temperature: float = 3.0

    def __post_init__(self):
        if self.output_loss not in ("mse", "kl"):
            raise ValueError(f"EED needs output_loss 'mse' or 'kl', but got output_loss={self.output_loss!r}.")
        if self.output_weight is not None:
            check_range(self, "output_weight", 0)
        check_range(self, "feature_weight", 0)
        check_range(self, "temperature", 0, strict=True)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``logit`` and ``feature``, each summed over all exits (section 3)."""
        ensemble_logits = _mean(output.exit_logits)
        ensemble_features = _mean(output.exit_features)
        label = output.label_loss(output.exit_logits, labels)
        if self.output_loss == "mse":
            weight = 1.0 if self.output_weight is None else self.output_weight
            logit = weight * add(mse(logits, ensemble_logits) for logits in output.exit_logits)
        else:
            weight = 0.1 if self.output_weight is None else self.output_weight
            logit = weight * divergence_of(output)(output.exit_logits, ensemble_logits, self.temperature)
        feature = self.feature_weight * add(mse(features, ensemble_features) for features in output.exit_features)
        return {"label": label, "logit": logit, "feature": feature}


def _mean(exits: Sequence[Tensor]) -> Tensor:
    # Not the mean of a stack, which would first copy all of them.
    return add(tensor.detach().float() for tensor in exits) / len(exits)
