"""Refine Myself by Teaching Myself: a feature pyramid on the network's own maps teaches it, and is dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..bifpn import BiFPN
from ..functional import add, attention_loss, cross_entropy, soften_kl
from ..outputs import MultiExitOutput
from .base import Method, check_range


class SelfTeacher(nn.Module):
    """BiFPNc and a classifier on its deepest map (FRSKD, section 3.1).

    Args:
        channels: Channels of the stages it reads, shallow to deep.
        stages: Indices of these stages.
        width_multiplier: Width of its levels over ``channels``.
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

        The maps that come in are not detached: what the self-teacher learns from the labels reaches the backbone.
        """
        student_maps = tuple(output.exit_maps[stage] for stage in self.stages)
        teacher_maps = self.pyramid(student_maps)
        logits = self.classifier(teacher_maps[-1].mean(dim=(2, 3)))
        return {"logits": logits, "teacher_maps": teacher_maps, "student_maps": student_maps}


@dataclass(frozen=True, kw_only=True)
class FRSKD(Method):
    """Refine Myself by Teaching Myself (Ji et al., CVPR 2021): https://arxiv.org/abs/2103.08273.

    The self-teacher reads the last stage of each of the four deepest resolutions of a hierarchical backbone (of a
    ResNet its four stages, without the stem), and the stages after each quarter of an isotropic one.

    Args:
        alpha: Weight of the soft labels, at least 0; ``None`` is the authors' for CIFAR-100, 2.
        beta: Weight of the attention loss, at least 0; ``None`` is the authors' for CIFAR-100, 100. It belongs to the
            mean over pixels of their code; the paper writes a norm.
        temperature: Softens both sets of logits, above 0; ``None`` is the authors', 4. Its square multiplies the
            divergence, as in their code.
        width_multiplier: Width of the self-teacher's levels over that of the stages, above 0.
    """

    name: ClassVar[str] = "frskd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2103.08273"
    detach_exits: ClassVar[bool] = True

    alpha: float | None = None
    beta: float | None = None
    temperature: float | None = None
    width_multiplier: float = 2.0

    def __post_init__(self):
        for name in ("alpha", "beta"):
            if getattr(self, name) is not None:
                check_range(self, name, 0)
        if self.temperature is not None:
            check_range(self, "temperature", 0, strict=True)
        check_range(self, "width_multiplier", 0, strict=True)

    def scaffold(self, model: nn.Module) -> SelfTeacher:
        """Build the self-teacher for the backbone of ``model``."""
        stages = model.anatomy.stages
        levels = _choose_stages([stage.size for stage in stages])
        channels = [stages[level].channels for level in levels]
        return SelfTeacher(channels, levels, self.width_multiplier, model.config.num_labels)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``teacher``, ``logit`` and ``attention``: the losses of section 3.2.

        ``teacher`` is the self-teacher's label loss. The last two never update it.

        Raises:
            ValueError: If ``output`` comes from a model without the self-teacher.
        """
        if output.scaffold is None:
            raise ValueError(
                "FRSKD was called without its self-teacher. Train with SelfDistillationTrainer, "
                "or set model.scaffold = method.scaffold(model)."
            )
        alpha = 2.0 if self.alpha is None else self.alpha
        beta = 100.0 if self.beta is None else self.beta
        temperature = 4.0 if self.temperature is None else self.temperature
        logits, teacher_logits = output.exit_logits[-1], output.scaffold["logits"]
        maps = zip(output.scaffold["student_maps"], output.scaffold["teacher_maps"], strict=True)
        return {
            "label": cross_entropy(logits, labels),
            "teacher": cross_entropy(teacher_logits, labels),
            "logit": alpha * soften_kl(logits, teacher_logits, temperature),
            "attention": beta * add(attention_loss(student, teacher) for student, teacher in maps),
        }


def _choose_stages(sizes: Sequence[tuple[int, int]]) -> list[int]:
    last_of = {size: index for index, size in enumerate(sizes)}
    if len(last_of) == 1:
        return sorted({max(0, round(len(sizes) * quarter / 4) - 1) for quarter in (1, 2, 3, 4)})
    return sorted(last_of.values())[-4:]
