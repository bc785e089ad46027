"""Knowledge distillation: the soft labels of a frozen teacher, or of the network's moving average, for every exit."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ..models.multi_label import MULTI_LABEL
from ..models.outputs import MultiExitOutput
from .averaged_teacher import ENSEMBLE, FINAL, AveragedTeacher, check_teacher_decay
from .base import Method, check_range, divergence_of, missing_scaffold
from .decoupled import decoupled_kl
from .teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class KD(Method):
    """Distilling the Knowledge in a Neural Network (Hinton et al. 2015): https://arxiv.org/abs/1503.02531.

    Args:
        teacher: A timm model, multi-exit model or transformers image classifier, or the name of one: a folder, a Hub
            repository, or a timm name, whose weights are downloaded. It is frozen, gets the same images as the
            student, and is not saved with it. ``"ema"`` is the moving average of the network itself, its final exit,
            and ``"ema_ensemble"`` the mean of that network's exits.
        alpha: For ``loss="kl"`` the share of each exit's loss that comes from the teacher, in [0, 1]. The paper only
            says that labels should have a considerably lower weight; ``None`` is 0.9, the usual value in comparisons
            on CIFAR. For ``loss="dkd"`` the weight of the teacher's part next to a label loss of weight 1, at least 0;
            ``None`` is 1, as in that paper, which raises it over the first epochs.
        temperature: Softens both sets of logits, above 0; its square multiplies the divergence. The paper tries 1 to
            20; 4 is the usual value with that ``alpha``, and DKD's for CIFAR-100.
        loss: ``"kl"``, or ``"dkd"``: Decoupled Knowledge Distillation (Zhao et al., CVPR 2022),
            https://arxiv.org/abs/2203.08679.
        non_target_weight: For ``loss="dkd"`` the weight of the classes that are not the label (its beta), at least 0;
            ``None`` is 8, which its authors' code takes for CIFAR-100; they tune it for each teacher.
        teacher_decay: For an averaged teacher the share of the average that remains at each step, in [0, 1); ``None``
            is 0.999.
    """

    name: ClassVar[str] = "kd"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification")

    teacher: nn.Module | str | None = field(default=None, repr=False)
    alpha: float | None = None
    temperature: float = 4.0
    loss: str = "kl"
    non_target_weight: float | None = None
    teacher_decay: float | None = None

    def __post_init__(self):
        if self.loss not in ("kl", "dkd"):
            raise ValueError(f"KD needs loss 'kl' or 'dkd', but got loss={self.loss!r}.")
        if self.alpha is not None:
            check_range(self, "alpha", 0, 1 if self.loss == "kl" else None)
        check_range(self, "temperature", 0, strict=True)
        if self.non_target_weight is not None:
            if self.loss == "kl":
                raise ValueError("KD takes non_target_weight with loss='dkd' only. Leave it at None for loss='kl'.")
            check_range(self, "non_target_weight", 0)
        check_teacher_decay("KD", self.teacher, self.teacher_decay)

    @property
    def paper(self) -> str:
        """The paper of the loss."""
        return f"https://arxiv.org/abs/{'2203.08679' if self.loss == 'dkd' else '1503.02531'}"

    def scaffold(self, model: nn.Module) -> Teacher | AveragedTeacher:
        """Return the teacher."""
        if self.teacher is None:
            raise ValueError(
                "KD needs a teacher, but got teacher=None. Pass a timm model, a multi-exit model, a transformers "
                "image classifier, or the name of one: get_method('kd', teacher='resnet50.a1_in1k')."
            )
        if self.teacher in (FINAL, ENSEMBLE):
            return AveragedTeacher(model, self.teacher_decay, ensemble=self.teacher == ENSEMBLE)
        return Teacher(self.teacher, model).to(model.device)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label`` and ``logit``, the two objectives of section 2, each summed over all exits.

        ``output.scaffold`` must hold ``teacher_logits`` ``(batch, classes)``.
        """
        if output.scaffold is None:
            raise missing_scaffold(self, "the logits of its teacher")
        exits, teacher_logits = output.exit_logits, output.scaffold["teacher_logits"]
        label = output.label_loss(exits, labels)
        if self.loss == "kl":
            alpha = 0.9 if self.alpha is None else self.alpha
            divergence = divergence_of(output)(exits, teacher_logits, self.temperature)
            return {"label": (1 - alpha) * label, "logit": alpha * divergence}
        alpha = 1.0 if self.alpha is None else self.alpha
        weight = 8.0 if self.non_target_weight is None else self.non_target_weight
        return {
            "label": label,
            "logit": alpha * decoupled_kl(exits, teacher_logits, labels, self.temperature, weight),
        }

    def _check_task(self, task: str, model: str) -> None:
        super()._check_task(task, model)
        if task == MULTI_LABEL and self.loss == "dkd":
            raise ValueError(
                f"KD with loss='dkd' separates the class of the label from all others, but {model} is one for {task}, "
                "where an image has any number of them. Take loss='kl'."
            )
