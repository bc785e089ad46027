"""Knowledge distillation: a frozen teacher's soft labels, for every exit."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ..models.outputs import MultiExitOutput
from .base import Method, check_range, divergence_of, missing_scaffold
from .teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class KD(Method):
    """Distilling the Knowledge in a Neural Network (Hinton et al. 2015): https://arxiv.org/abs/1503.02531.

    Args:
        teacher: A timm model, multi-exit model or transformers image classifier, or the name of one: a folder, a Hub
            repository, or a timm name, whose weights are downloaded. It is frozen, gets the same images as the
            student, and is not saved with it.
        alpha: Share of each exit's loss that comes from the teacher, in [0, 1]. The paper only says that labels should
            have a considerably lower weight; 0.9 is the usual value in comparisons on CIFAR.
        temperature: Softens both sets of logits, above 0; its square multiplies the divergence. The paper tries 1 to
            20; 4 is the usual value with that ``alpha``.
    """

    name: ClassVar[str] = "kd"
    paper: ClassVar[str] = "https://arxiv.org/abs/1503.02531"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification")

    teacher: nn.Module | str | None = field(default=None, repr=False)
    alpha: float = 0.9
    temperature: float = 4.0

    def __post_init__(self):
        check_range(self, "alpha", 0, 1)
        check_range(self, "temperature", 0, strict=True)

    def scaffold(self, model: nn.Module) -> Teacher:
        """Return the teacher."""
        if self.teacher is None:
            raise ValueError(
                "KD needs a teacher, but got teacher=None. Pass a timm model, a multi-exit model, a transformers "
                "image classifier, or the name of one: get_method('kd', teacher='resnet50.a1_in1k')."
            )
        return Teacher(self.teacher, model).to(model.device)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label`` and ``logit``, the two objectives of section 2, each summed over all exits.

        ``output.scaffold`` must hold ``teacher_logits`` ``(batch, classes)``.
        """
        if output.scaffold is None:
            raise missing_scaffold(self, "the logits of its teacher")
        teacher_logits = output.scaffold["teacher_logits"]
        label = (1 - self.alpha) * output.label_loss(output.exit_logits, labels)
        logit = self.alpha * divergence_of(output)(output.exit_logits, teacher_logits, self.temperature)
        return {"label": label, "logit": logit}
