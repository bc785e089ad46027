"""The arithmetic of the methods: pure functions of tensors, each once.

Everything that exponentiates or divides runs in float32, also under autocast. Losses are means per sample, so that
nothing depends on batch size, gradient accumulation or number of processes.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over what is labelled; 0 where nothing is.

    Args:
        logits: ``(batch, classes)`` or ``(batch, classes, height, width)``.
        labels: Class indices ``(batch,)`` or ``(batch, height, width)``, -100 where there is no label; or class
            probabilities shaped like ``logits``, as label smoothing, mixup and cutmix make them.

    Returns:
        A scalar.

    Raises:
        ValueError: If ``labels`` has neither of these shapes.
    """
    logits = logits.float()
    if labels.is_floating_point() and labels.shape == logits.shape:
        total = F.cross_entropy(logits, labels.float(), reduction="sum")
        return total / (labels.sum(dim=1) > 0).sum().clamp(min=1)
    if labels.is_floating_point() or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"labels must be class indices shaped {tuple(logits.shape[:1] + logits.shape[2:])} or class probabilities "
            f"shaped {tuple(logits.shape)}, but got {labels.dtype} labels shaped {tuple(labels.shape)}."
        )
    labels = labels.long()
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def soften_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from softened teacher to softened student, times the squared temperature.

    ``T^2 * mean_b sum_c p_t (log p_t - log p_s)`` with ``p = softmax(logits / T)`` (Hinton et al. 2015, section 2).
    The factor keeps the size of the gradient independent of the temperature. The teacher is detached here, so that no
    method can forget to.

    Args:
        student_logits: ``(batch, classes)``, or ``(batch, classes, height, width)`` for a mean over pixels.
        teacher_logits: Shaped like ``student_logits``.
        temperature: Divides both logits, above 0.

    Returns:
        A scalar, 0 where both agree.
    """
    divergence = F.kl_div(
        F.log_softmax(student_logits.float() / temperature, dim=1),
        F.log_softmax(teacher_logits.detach().float() / temperature, dim=1),
        reduction="sum",
        log_target=True,
    )
    return divergence * (temperature**2 * student_logits.shape[1] / student_logits.numel())


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements, in float32, the teacher detached. Returns a scalar."""
    return F.mse_loss(student.float(), teacher.detach().float())


def attention_map(stage_map: Tensor) -> Tensor:
    """Where a map is active: the mean of squares over channels, one unit vector per sample, in float32.

    ``v / max(|v|, 1e-12)`` with ``v = mean_c F^2`` (Zagoruyko & Komodakis, ICLR 2017, section 3.1).

    Args:
        stage_map: ``(batch, channels, height, width)``.

    Returns:
        ``(batch, height * width)``; all zero for a map that is zero.
    """
    return F.normalize(stage_map.float().square().mean(dim=1).flatten(1), dim=1)


def attention_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of two attention maps over samples and pixels, the teacher detached.

    Channels may differ. A map of one pixel is 1 whatever it holds, so its loss is 0.

    Args:
        student_map: ``(batch, channels, height, width)``.
        teacher_map: ``(batch, channels, height, width)``, of the same size.

    Returns:
        A scalar.
    """
    return mse(attention_map(student_map), attention_map(teacher_map))


def smooth_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Turn class indices ``(batch,)`` into probabilities ``(batch, classes)`` (Szegedy et al. 2016, section 7).

    Probabilities are smoothed further, as after mixup. A row without a label (-100) becomes all zero, which
    :func:`cross_entropy` counts as no loss.
    """
    if not labels.is_floating_point():
        known = (labels != -100).unsqueeze(-1)
        labels = F.one_hot(labels.clamp(min=0), num_classes).float() * known
    return labels * (1 - smoothing) + labels.sum(dim=-1, keepdim=True) * (smoothing / num_classes)


def add(terms: Iterable[Tensor]) -> Tensor:
    """Sum scalars into one; none of them gives a 0 tensor, so that a term is always a tensor."""
    terms = list(terms)
    return torch.stack(terms).sum() if terms else torch.zeros(())
