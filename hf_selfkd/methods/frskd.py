"""Refine Myself by Teaching Myself: a feature pyramid on the network's own feature maps is its teacher in training."""

from dataclasses import dataclass
from functools import partial
from math import floor
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional import add, attention_loss, resize_logits, sigmoid_ramp
from ..models.outputs import MultiExitOutput
from .base import Method, check_range, divergence_of, missing_scaffold
from .self_teacher import SegmentationSelfTeacher, SelfTeacher, build_self_teacher

# The authors' values: their command line for CIFAR-100, their code for VOC.
_CLASSIFICATION = {"alpha": 2.0, "beta": 100.0, "temperature": 4.0, "ramp_start": None, "ramp_end": None}
_SEGMENTATION = {"alpha": 1.0, "beta": 50.0, "temperature": 1.0, "ramp_start": 40.0, "ramp_end": 60.0}


@dataclass(frozen=True, kw_only=True)
class FRSKD(Method):
    """Refine Myself by Teaching Myself (Ji et al., CVPR 2021): https://arxiv.org/abs/2103.08273.

    The self-teacher reads the stages that :func:`~hf_selfkd.models.stages.choose_stages` chooses (for a ResNet its
    four stages, without the stem), in segmentation all levels of the pyramid.

    Hyper-parameters left at ``None`` are the authors': for classification those for CIFAR-100, for segmentation those
    for VOC.

    Args:
        alpha: Weight of the soft labels, at least 0; ``None`` is 2, for segmentation 1.
        beta: Weight of the attention loss, at least 0; ``None`` is 100, for segmentation 50. It applies to the mean
            over pixels, as in the authors' code; the paper writes a norm.
        temperature: Softens both sets of logits, above 0; ``None`` is 4, for segmentation 1. Its square multiplies the
            divergence, as in their code.
        ramp_start: Epoch before which the distillation terms are 0, at least 0; ``None`` means no ramp, for
            segmentation 40.
        ramp_end: Epoch from which they have their full weight, above ``ramp_start``; ``None`` means no ramp,
            for segmentation 60, the end of the authors' run.
        width_multiplier: Width of the self-teacher's levels divided by that of the stages, above 0; in segmentation
            they are as wide as the pyramid.
        mask_void: In segmentation, whether ignored pixels are excluded from the soft labels. The authors' code
            includes them.
    """

    name: ClassVar[str] = "frskd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2103.08273"
    detach_exits: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification", "image-segmentation")

    alpha: float | None = None
    beta: float | None = None
    temperature: float | None = None
    ramp_start: float | None = None
    ramp_end: float | None = None
    width_multiplier: float = 2.0
    mask_void: bool = True

    def __post_init__(self):
        for name in ("alpha", "beta", "ramp_start"):
            if getattr(self, name) is not None:
                check_range(self, name, 0)
        if self.temperature is not None:
            check_range(self, "temperature", 0, strict=True)
        if (self.ramp_start is None) != (self.ramp_end is None):
            raise ValueError(
                f"FRSKD needs ramp_start and ramp_end together, but got ramp_start={self.ramp_start!r} and "
                f"ramp_end={self.ramp_end!r}."
            )
        if self.ramp_end is not None:
            check_range(self, "ramp_end", self.ramp_start, strict=True)
        check_range(self, "width_multiplier", 0, strict=True)

    def scaffold(self, model: nn.Module) -> SelfTeacher | SegmentationSelfTeacher:
        """Build the self-teacher of ``model``."""
        return build_self_teacher(model, self.width_multiplier)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``teacher``, ``logit`` and ``attention``: the losses of section 3.2.

        ``teacher`` is the label loss of the self-teacher, which gets no gradient from the last two.

        Raises:
            ValueError: If ``output`` comes from a model without the self-teacher.
        """
        if output.scaffold is None:
            raise missing_scaffold(self, "its self-teacher")
        logits, teacher_logits = output.exit_logits[-1], output.scaffold["logits"]
        alpha, beta, temperature, ramp_start, ramp_end = (
            default if getattr(self, name) is None else getattr(self, name)
            for name, default in (_SEGMENTATION if output.is_dense else _CLASSIFICATION).items()
        )
        divergence = divergence_of(output)
        if output.is_dense:
            logits = resize_logits(logits.float(), labels.shape[-2:])
            teacher_logits = resize_logits(teacher_logits.float(), labels.shape[-2:])
            divergence = partial(divergence, mask=labels != -100) if self.mask_void else divergence
        ramp = 1.0 if ramp_start is None else _ramp(epoch, ramp_start, ramp_end)
        terms = {"label": output.label_loss(logits, labels), "teacher": output.label_loss(teacher_logits, labels)}
        if ramp == 0:  # no parameter depends on the other two alone, and for large feature maps they are expensive
            zero = logits.new_zeros((), dtype=torch.float32)
            return terms | {"logit": zero, "attention": zero}
        maps = zip(output.scaffold["student_maps"], output.scaffold["teacher_maps"], strict=True)
        return terms | {
            "logit": ramp * alpha * divergence(logits, teacher_logits, temperature),
            "attention": ramp * beta * add(attention_loss(*pair) for pair in maps),
        }


def _ramp(epoch: float, start: float, end: float) -> float:
    # In complete epochs, as in the authors' code, where the first epoch of the ramp already counts as completed.
    return sigmoid_ramp((floor(epoch) + 1 - start) / (end - start)) if floor(epoch) >= start else 0.0
