"""Decoupled knowledge distillation: the divergence from the teacher, its two parts weighted apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import add, masked_mean


def decoupled_kl(
    student_logits: Sequence[Tensor],
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    non_target_weight: float,
) -> Tensor:
    """Decoupled divergence of softened logits, times the squared temperature (DKD, Zhao et al., CVPR 2022).

    The divergence between the label's class and all others, plus ``non_target_weight`` times that among the others. In
    the plain divergence this weight is the teacher's probability of the others, which vanishes where it is confident.
    The teacher is detached.

    Args:
        student_logits: Tensors ``(batch, classes)``, whose divergences are summed.
        teacher_logits: ``(batch, classes)``.
        labels: Class indices ``(batch,)``, or probabilities ``(batch, classes)``, whose largest is the label. Images
            without a label (-100, or all probabilities 0) are left out.
        temperature: Divides both logits, above 0.
        non_target_weight: The paper's beta.

    Returns:
        A scalar.
    """
    is_labelled = labels.sum(dim=1) > 0 if labels.is_floating_point() else labels != -100
    classes = (labels.argmax(dim=1) if labels.is_floating_point() else labels.clamp(min=0)).unsqueeze(1)
    target, others = _log_parts(teacher_logits.detach().float() / temperature, classes)

    def divergence(logits: Tensor) -> Tensor:
        student_target, student_others = _log_parts(logits.float() / temperature, classes)
        return _kl(target, student_target) + non_target_weight * _kl(others, student_others)

    return temperature**2 * masked_mean(add(map(divergence, student_logits)), is_labelled)


def _log_parts(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of label and rest ``(batch, 2)``, and of the others among themselves."""
    others = logits.scatter(1, classes, -1e4)  # finite: a probability of 0 whose logarithm has differences
    binary = torch.cat([logits.gather(1, classes), others.logsumexp(dim=1, keepdim=True)], dim=1)
    return binary.log_softmax(dim=1), others.log_softmax(dim=1)


def _kl(target: Tensor, student: Tensor) -> Tensor:
    return (target.exp() * (target - student)).sum(dim=1)
