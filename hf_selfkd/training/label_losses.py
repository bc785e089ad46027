"""Loss functions of the user's own as the label loss of every exit."""

from collections.abc import Callable

from torch import Tensor

from ..functional import count_selected, resize_logits
from ..models.outputs import MultiExitOutput


def from_stock(compute_loss_func: Callable[..., Tensor] | None) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the label loss of one exit that calls a ``compute_loss_func`` of ``Trainer``.

    It is called as ``compute_loss_func(outputs, labels, num_items_in_batch=n)``, once per exit: ``outputs.logits`` are
    those of the exit, ``(batch, classes)``, for segmentation interpolated to the size of the labels. ``n`` is the
    number of labelled images, or pixels, in the micro-batch, averaged over processes: a mean and a sum divided by
    ``n`` both give the mean of the global batch, whatever the gradient accumulation.

    Args:
        compute_loss_func: Returns a scalar; ``None`` for the built-in loss.
    """
    if compute_loss_func is None:
        return None

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.float()
        if logits.dim() == 4:
            logits = resize_logits(logits, labels.shape[-2:])
        is_soft = labels.is_floating_point()
        count = count_selected(labels.sum(dim=1) > 0 if is_soft else labels != -100)
        labels = labels if is_soft else labels.long()
        return compute_loss_func(MultiExitOutput(logits=logits), labels, num_items_in_batch=count)

    return loss
