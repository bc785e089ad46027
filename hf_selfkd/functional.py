"""The arithmetic of the methods: pure functions of tensors.

Everything that exponentiates or divides runs in float32, also under autocast. Losses are means per sample, so that
nothing depends on batch size, gradient accumulation or number of processes; see :mod:`hf_selfkd.models.loss`.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from .models.loss import add as add
from .models.loss import as_sequence, count_selected, pixel_mean
from .models.loss import counted_over_processes as counted_over_processes
from .models.loss import cross_entropy as cross_entropy
from .models.loss import label_loss as label_loss
from .models.loss import resize_logits as resize_logits
from .models.loss import shared_mean as shared_mean
from .models.loss import weighted_cross_entropy as weighted_cross_entropy
from .models.multi_label import binary_cross_entropy as binary_cross_entropy


def soften_kl(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor,
    temperature: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Kullback-Leibler divergence from softened teacher to softened student, times the squared temperature.

    ``T^2 * mean_b sum_c p_t (log p_t - log p_s)`` with ``p = softmax(logits / T)`` (Hinton et al. 2015, section 2).
    The factor makes the scale of the gradient independent of the temperature. The teacher is detached here, for all
    methods.

    Args:
        student_logits: ``(batch, classes)``, or ``(batch, classes, height, width)`` for a mean over pixels; or a
            sequence of such tensors, whose divergences are summed.
        teacher_logits: Shaped like each student's.
        temperature: Divides both logits, above 0.
        mask: ``(batch, height, width)``, true for the pixels to average over; ``None`` for all.

    Returns:
        A scalar, 0 if both agree.
    """
    target = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    probabilities = target.exp()
    divergence = add(
        (probabilities * (target - F.log_softmax(student.float() / temperature, dim=1))).sum(dim=1)
        for student in as_sequence(student_logits)
    )
    return temperature**2 * (divergence.mean() if mask is None else pixel_mean(divergence, mask))


def binary_kl(student_logits: Tensor | Sequence[Tensor], teacher_logits: Tensor, temperature: float) -> Tensor:
    """:func:`soften_kl` of multi-label models: between the two outcomes of every class, a mean over classes.

    ``T^2 * mean_bc [p_t log(p_t / p_s) + (1 - p_t) log((1 - p_t) / (1 - p_s))]`` with ``p = sigmoid(logits / T)``:
    the multi-label logits distillation of Yang et al. (ICCV 2023, https://arxiv.org/abs/2308.06453), softened; a mean
    over classes as :func:`binary_cross_entropy`, so that their weights keep their meaning. The teacher is detached.

    Args:
        student_logits: ``(batch, classes)``, or a sequence of such tensors, whose divergences are summed.
        teacher_logits: ``(batch, classes)``.
        temperature: Divides both logits, above 0.

    Returns:
        A scalar, 0 if both agree.
    """
    target, divergences = teacher_logits.detach().float() / temperature, []
    for student in (logits.float() / temperature for logits in as_sequence(student_logits)):
        for sign in (1, -1):  # the class is there, or not
            soft = F.logsigmoid(sign * target)
            divergences.append(soft.exp() * (soft - F.logsigmoid(sign * student)))
    return temperature**2 * add(divergences).mean()


def soft_cross_entropy(logits: Tensor | Sequence[Tensor], probabilities: Tensor) -> Tensor:
    """Cross-entropy ``-sum_c p_c log softmax(z)_c`` per sample, in float32, the probabilities detached.

    Args:
        logits: ``(batch, classes)``, or a sequence of such tensors, whose losses are summed.
        probabilities: ``(batch, classes)``.

    Returns:
        ``(batch,)``.
    """
    target = probabilities.detach().float()
    return add(-(target * F.log_softmax(each.float(), dim=1)).sum(dim=1) for each in as_sequence(logits))


def target_classes(probabilities: Tensor) -> Tensor:
    """Return which classes are those of the label: the most probable one, for mixed labels the two most probable.

    A class that is no more probable than the least probable one is not: the rest of a smoothed label, and all classes
    of an image without a label.

    Args:
        probabilities: ``(batch, classes)``.

    Returns:
        ``(batch, classes)``, booleans.
    """
    top = torch.zeros_like(probabilities, dtype=torch.bool)
    top.scatter_(1, probabilities.topk(min(2, probabilities.shape[1]), dim=1).indices, True)
    return top & (probabilities > probabilities.amin(dim=1, keepdim=True))


def non_target_log_softmax(logits: Tensor, is_target: Tensor) -> Tensor:
    """Logarithm of ``p / (1 - p_t)``, in float32: for all classes but the targets their log-softmax among themselves.

    Args:
        logits: ``(batch, classes)``.
        is_target: ``(batch, classes)``, see :func:`target_classes`.

    Returns:
        ``(batch, classes)``.
    """
    logits = logits.float()
    return logits - logits.masked_fill(is_target, -torch.inf).logsumexp(dim=1, keepdim=True)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements, in float32, the teacher detached. Returns a scalar."""
    return F.mse_loss(student.float(), teacher.detach().float())


def attention_map(feature_map: Tensor) -> Tensor:
    """Attention map of a feature map: the mean of squares over channels, one unit vector per sample, in float32.

    ``v / max(|v|, 1e-12)`` with ``v = mean_c F^2`` (Zagoruyko & Komodakis, ICLR 2017, section 3.1).

    Args:
        feature_map: ``(batch, channels, height, width)``.

    Returns:
        ``(batch, height * width)``; all zero for a feature map that is zero.
    """
    return F.normalize(feature_map.float().square().mean(dim=1).flatten(1), dim=1)


def attention_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of two attention maps over samples and pixels, the teacher detached.

    Channels may differ. The attention map of a single pixel is always 1, so its loss is 0.

    Args:
        student_map: ``(batch, channels, height, width)``.
        teacher_map: ``(batch, channels, height, width)``, of the same size.

    Returns:
        A scalar.
    """
    return mse(attention_map(student_map), attention_map(teacher_map))


def smooth_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Turn class indices ``(batch,)`` into probabilities ``(batch, classes)`` (Szegedy et al. 2016, section 7).

    Probabilities, for example after mixup, are smoothed further. A row without a label (-100) becomes all zero, for
    which :func:`cross_entropy` is 0.
    """
    if not labels.is_floating_point():
        known = (labels != -100).unsqueeze(-1)
        labels = F.one_hot(labels.clamp(min=0), num_classes).float() * known
    return labels * (1 - smoothing) + labels.sum(dim=-1, keepdim=True) * (smoothing / num_classes)


def hash_projection(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Project features onto the normals of hash planes: ``W f + b`` (LSH, Wang et al. 2021).

    In float32 also under autocast, where rounding could otherwise flip a bit.

    Args:
        features: ``(batch, width)``, not normalised.
        weight: ``(hashes, width)``, one normal per row.
        bias: ``(hashes,)``.

    Returns:
        ``(batch, hashes)``, above 0 on the side of the plane where the bit is 1.
    """
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.float(), weight.float(), bias.float())


def hash_loss(student_projection: Tensor, teacher_projection: Tensor) -> Tensor:
    """Binary cross-entropy of the student's projections against the teacher's bits, a mean over hashes per sample.

    A bit is 1 where the teacher's projection is above 0. The teacher is detached.

    Args:
        student_projection: ``(batch, hashes)``, from :func:`hash_projection`.
        teacher_projection: ``(batch, hashes)``.

    Returns:
        ``(batch,)``.
    """
    bits = (teacher_projection.detach() > 0).float()
    return F.binary_cross_entropy_with_logits(student_projection.float(), bits, reduction="none").mean(dim=1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of vectors ``(batch, width)``, a mean over the width per sample, the teacher detached."""
    return F.mse_loss(student.float(), teacher.detach().float(), reduction="none").mean(dim=1)


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each image whether its prediction, the largest logit, is the label.

    Args:
        logits: ``(batch, classes)``.
        labels: Class indices ``(batch,)``, or probabilities ``(batch, classes)``, whose largest is the label. Without
            a label (-100, or all probabilities 0) no prediction is correct.

    Returns:
        ``(batch,)``, booleans.
    """
    predictions = logits.argmax(dim=1)
    if not labels.is_floating_point():
        return predictions == labels
    probabilities = labels.gather(1, predictions.unsqueeze(1)).squeeze(1)
    return (probabilities == labels.amax(dim=1)) & (probabilities > 0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``values`` ``(batch,)`` where ``mask`` ``(batch,)`` is true, 0 if nowhere; of all if it is ``None``."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / count_selected(mask)


def median_bias(features: Tensor, weight: Tensor, max_elements: int = 2**26) -> Tensor:
    """Biases that move each hash plane to the median of the features: minus the median of ``W f``.

    For an even number of features the lower median is taken, as in the authors' code.

    Args:
        features: ``(samples, width)``.
        weight: ``(hashes, width)``.
        max_elements: Largest number of projections held at once; hashes are processed in chunks.

    Returns:
        ``(hashes,)``, in float32.
    """
    features = features.float()
    middle = (len(features) - 1) // 2
    chunk_size = max(1, max_elements // len(features))
    with torch.autocast(features.device.type, enabled=False):
        # Sorting, because torch.median has no deterministic kernel on an accelerator.
        medians = [(chunk @ features.T).sort(dim=1).values[:, middle] for chunk in weight.float().split(chunk_size)]
    return -torch.cat(medians)


def sigmoid_ramp(progress: float) -> float:
    """Rise from ``exp(-5)`` to 1 as ``exp(-5 (1 - progress)^2)``, 1 from there on (Laine & Aila, ICLR 2017).

    Args:
        progress: Completed share of the ramp, at least 0.
    """
    return math.exp(-5 * (1 - min(progress, 1)) ** 2)


def gated_sum(logits: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Sum the logits of several students, weighted by a gate per student and sample.

    Args:
        logits: One tensor ``(batch, classes)`` per student.
        gates: ``(batch, students)``.

    Returns:
        ``(batch, classes)``, in float32.
    """
    return (torch.stack(list(logits), dim=1).float() * gates.float().unsqueeze(-1)).sum(dim=1)


def gram_overlap(weights: Sequence[Tensor]) -> Tensor:
    """Sum over pairs of classifiers of the Frobenius norm of ``W_j^T W_k``, each ``W`` shaped ``(classes, width)``.

    0 if the columns of all classifiers are orthogonal. It also decreases with the weights.
    """
    with torch.autocast(weights[0].device.type, enabled=False):  # otherwise the product would not be in float32
        return add(torch.linalg.matrix_norm(a.float().T @ b.float()) for a, b in combinations(weights, 2))


def cosine_overlap(weights: Sequence[Tensor]) -> Tensor:
    """Mean over pairs of classifiers and over classes of the absolute cosine between the two rows of a class."""
    rows = [F.normalize(weight.float(), dim=1) for weight in weights]
    pairs = [(a * b).sum(dim=1).abs().mean() for a, b in combinations(rows, 2)]
    return add(pairs) / max(1, len(pairs))


def disagreement(logits: Sequence[Tensor], *, multi_label: bool = False) -> Tensor:
    """Mean over pairs and samples of the Euclidean distance between softmax (or sigmoid) outputs."""
    probabilities = [tensor.float().sigmoid() if multi_label else tensor.float().softmax(dim=1) for tensor in logits]
    pairs = [torch.linalg.vector_norm(a - b, dim=1).mean() for a, b in combinations(probabilities, 2)]
    return add(pairs) / max(1, len(pairs))
