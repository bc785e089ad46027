"""Be Your Own Teacher: every exit learns from the labels and from the final exit."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..functional import add, mse
from ..models.outputs import MultiExitOutput
from .averaged_teacher import FINAL, AveragedTeacher, check_teacher_decay
from .base import Method, check_range, divergence_of, missing_scaffold


@dataclass(frozen=True, kw_only=True)
class BYOT(Method):
    """Be Your Own Teacher (Zhang et al., ICCV 2019): https://arxiv.org/abs/1905.08094.

    Args:
        alpha: Share of each auxiliary exit's logit loss that comes from the teacher, in [0, 1].
        temperature: Softens both sets of logits, above 0. Its square multiplies the divergence, as in the best public
            reproduction; the authors' journal code omits it.
        hint_weight: Weight of the feature hint, at least 0. The paper sums squared errors; we average them, so that
            the weight does not depend on batch size or feature width. 0.03 on the mean is close to the values of
            other implementations.
        teacher: ``None`` for the final exit itself, or ``"ema"`` for the final exit of the network's moving average.
        teacher_decay: Share of the average that remains at each step, in [0, 1); ``None`` is 0.999.
    """

    name: ClassVar[str] = "byot"
    paper: ClassVar[str] = "https://arxiv.org/abs/1905.08094"
    min_exits: ClassVar[int] = 2
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification")

    alpha: float = 0.3
    temperature: float = 3.0
    hint_weight: float = 0.03
    teacher: str | None = None
    teacher_decay: float | None = None

    def __post_init__(self):
        check_range(self, "alpha", 0, 1)
        check_range(self, "temperature", 0, strict=True)
        check_range(self, "hint_weight", 0)
        if self.teacher not in (None, FINAL):
            raise ValueError(
                f"BYOT needs teacher None (the final exit) or '{FINAL}' (its moving average), but got "
                f"teacher={self.teacher!r}. Another network teaches in kd and lsh."
            )
        check_teacher_decay("BYOT", self.teacher, self.teacher_decay)

    def scaffold(self, model: nn.Module) -> AveragedTeacher | None:
        """Return the averaged teacher, if there is one."""
        return None if self.teacher is None else AveragedTeacher(model, self.teacher_decay)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``logit`` and ``hint``: the three losses of section 3.2.

        The final exit, which is the teacher or whose average is, learns from the labels alone, with weight 1.
        """
        *early_logits, final_logits = output.exit_logits
        *early_features, final_features = output.exit_features
        label = output.label_loss(final_logits, labels) + (1 - self.alpha) * output.label_loss(early_logits, labels)
        teacher_logits, teacher_features = final_logits, final_features
        if self.teacher is not None:
            if output.scaffold is None:
                raise missing_scaffold(self, "its averaged teacher")
            teacher_logits, teacher_features = (output.scaffold[f"teacher_{name}"] for name in ("logits", "features"))
        logit = self.alpha * divergence_of(output)(early_logits, teacher_logits, self.temperature)
        hint = self.hint_weight * add(mse(features, teacher_features) for features in early_features)
        return {"label": label, "logit": logit, "hint": hint}
