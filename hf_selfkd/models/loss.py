"""The label loss of every exit, and averages over samples and pixels: the arithmetic that models and methods share.

Everything that exponentiates or divides runs in float32, also under autocast. Losses are means per sample, so that
nothing depends on batch size, gradient accumulation or number of processes. For segmentation they are means over the
labelled pixels of an image, then over images. Means over a subset of the samples (the labelled ones, those that a
teacher predicts correctly) are taken within the micro-batch; under :func:`counted_over_processes` over all processes.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_counting = threading.local()
_replaced = threading.local()


@contextmanager
def counted_over_processes() -> Iterator[None]:
    """Correct the gradients of means over a subset of samples for data-parallel processes, which average gradients.

    Two processes with 1 and 3 labelled images must not weigh them 3 to 1. A sum is divided by the number of such
    samples that a process has on average, so that the average over processes is the mean over the global batch. All
    processes must compute their losses under it; without a process group, or with one process, it changes nothing.
    """
    _counting.over_processes = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    try:
        yield
    finally:
        _counting.over_processes = False


def count_selected(mask: Tensor) -> Tensor:
    """Return the denominator of a masked mean, at least 1; see :func:`counted_over_processes`."""
    count = mask.sum()
    if not getattr(_counting, "over_processes", False):
        return count.clamp(min=1)
    dist.all_reduce(count)
    return count.clamp(min=1) / dist.get_world_size()


@contextmanager
def label_loss(loss: Callable[[Tensor, Tensor], Tensor] | None) -> Iterator[list[Tensor]]:
    """Replace the label loss of every exit: :func:`cross_entropy` returns the sum of ``loss(logits, labels)``.

    Every method takes its label loss from :func:`cross_entropy`, so that class weights and a loss function of one's
    own have their effect on all label terms.

    Args:
        loss: Maps the logits of one exit and the labels, as :func:`cross_entropy` takes them, to a scalar; ``None``
            for the cross-entropy.

    Yields:
        A list to which each loss is appended: it stays empty where no label loss is taken from here.
    """
    losses: list[Tensor] = []

    def recorded(logits: Tensor, labels: Tensor) -> Tensor:
        losses.append(loss(logits, labels))
        return losses[-1]

    _replaced.loss = None if loss is None else recorded
    try:
        yield losses
    finally:
        _replaced.loss = None


def cross_entropy(logits: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled samples, 0 if there are none; or the loss of :func:`label_loss`.

    Args:
        logits: ``(batch, classes)`` or ``(batch, classes, height, width)``, which is interpolated to the size of
            the labels; or a sequence of such tensors, whose losses are summed.
        labels: Class indices ``(batch,)`` or ``(batch, height, width)``, -100 where there is no label; or class
            probabilities of the shape of ``logits``, from label smoothing, mixup or cutmix.

    Returns:
        A scalar.

    Raises:
        ValueError: If ``labels`` has neither of these shapes.
    """
    replaced = replaced_loss(logits, labels)
    return weighted_cross_entropy(logits, labels) if replaced is None else replaced


def replaced_loss(logits: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor | None:
    """Return the sum over exits of the loss that :func:`label_loss` put in place, ``None`` if there is none."""
    replaced = getattr(_replaced, "loss", None)
    return None if replaced is None else add(replaced(each, labels) for each in as_sequence(logits))


def weighted_cross_entropy(
    logits: Tensor | Sequence[Tensor], labels: Tensor, class_weights: Tensor | None = None
) -> Tensor:
    """Mean over the labelled samples of the cross-entropy times the weight of the label; 0 if there are none.

    ``mean_b sum_c -w_c y_bc log p_bc``. The mean is over samples, not over their weights as in torch's
    ``CrossEntropyLoss``, so that a sample has the same influence in every batch.

    Args:
        logits: As for :func:`cross_entropy`.
        labels: As for :func:`cross_entropy`.
        class_weights: ``(classes,)``; ``None`` for weights of 1.

    Returns:
        A scalar.

    Raises:
        ValueError: As :func:`cross_entropy`.
    """
    is_soft = labels.is_floating_point()
    labels = labels.float() if is_soft else labels.long()
    is_dense = labels.dim() == 3
    reduction = "none" if is_dense else "sum"
    # One after the other, so that only one exit's logits are interpolated to the size of the labels at a time.
    loss = add(_cross_entropy(each, labels, class_weights, reduction) for each in as_sequence(logits))
    if is_dense:
        return pixel_mean(loss, labels != -100)
    return loss / count_selected(labels.sum(dim=1) > 0 if is_soft else labels != -100)


def _cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    logits = logits.float()
    if logits.dim() == 4:
        logits = resize_logits(logits, labels.shape[-2:])
    indices_shape = logits.shape[:1] + logits.shape[2:]
    if labels.shape != (logits.shape if labels.is_floating_point() else indices_shape):
        raise ValueError(
            f"labels must be class indices shaped {tuple(indices_shape)} or class probabilities shaped "
            f"{tuple(logits.shape)}, but got {labels.dtype} labels shaped {tuple(labels.shape)}."
        )
    return F.cross_entropy(logits, labels, weight, ignore_index=-100, reduction=reduction)


def as_sequence(logits: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the logits of one or several exits as a sequence."""
    return [logits] if isinstance(logits, Tensor) else logits


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate logits ``(batch, classes, height, width)`` bilinearly to another height and width."""
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def pixel_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` ``(batch, height, width)`` over the masked pixels of each image, then over images."""
    counts = mask.flatten(1).sum(dim=1).clamp(min=1)
    return ((values * mask).flatten(1).sum(dim=1) / counts).mean()


def add(terms: Iterable[Tensor]) -> Tensor:
    """Sum tensors; an empty sum is a zero tensor, so that a term is always a tensor."""
    terms = list(terms)
    return reduce(torch.add, terms) if terms else torch.zeros(())


def shared_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is true, detached, 0 if nowhere; see :func:`counted_over_processes`."""
    sums = torch.stack([(values.detach() * mask).sum(), mask.sum().to(values.dtype)])
    if getattr(_counting, "over_processes", False):
        dist.all_reduce(sums)
    return sums[0] / sums[1].clamp(min=1)
