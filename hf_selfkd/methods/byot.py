"""Be Your Own Teacher: every exit learns from the labels and from the final exit."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..functional import add, mse
from ..models.outputs import MultiExitOutput
from .base import Method, check_range, divergence_of


@dataclass(frozen=True, kw_only=True)
class BYOT(Method):
    """Be Your Own Teacher (Zhang et al., ICCV 2019): https://arxiv.org/abs/1905.08094.

    Args:
        alpha: Share of each auxiliary exit's logit loss that comes from the final exit, in [0, 1].
        temperature: Softens both sets of logits, above 0. Its square multiplies the divergence, as in the best public
            reproduction; the authors' journal code omits it.
        hint_weight: Weight of the feature hint, at least 0. The paper sums squared errors; we average them, so that
            the weight does not depend on batch size or feature width. 0.03 on the mean is close to the values of
            other implementations.
    """

    name: ClassVar[str] = "byot"
    paper: ClassVar[str] = "https://arxiv.org/abs/1905.08094"
    min_exits: ClassVar[int] = 2
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification")

    alpha: float = 0.3
    temperature: float = 3.0
    hint_weight: float = 0.03

    def __post_init__(self):
        check_range(self, "alpha", 0, 1)
        check_range(self, "temperature", 0, strict=True)
        check_range(self, "hint_weight", 0)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``logit`` and ``hint``: the three losses of section 3.2. The final exit is the teacher.

        It learns from the labels alone, with weight 1.
        """
        *early_logits, final_logits = output.exit_logits
        *early_features, final_features = output.exit_features
        label = output.label_loss(final_logits, labels) + (1 - self.alpha) * output.label_loss(early_logits, labels)
        logit = self.alpha * divergence_of(output)(early_logits, final_logits, self.temperature)
        hint = self.hint_weight * add(mse(features, final_features) for features in early_features)
        return {"label": label, "logit": logit, "hint": hint}
