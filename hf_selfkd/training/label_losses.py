"""Loss functions of the user's own as the label loss of every exit."""

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import Trainer

from ..functional import count_selected, resize_logits
from ..models.multi_label import is_known
from ..models.outputs import MultiExitOutput


def from_stock(
    compute_loss_func: Callable[..., Tensor] | None, trainer: Trainer
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the label loss of one exit that calls a ``compute_loss_func`` of ``Trainer``.

    It is called as ``compute_loss_func(outputs, labels, num_items_in_batch=n)``, once per exit: ``outputs.logits`` are
    those of the exit, ``(batch, classes)``, for segmentation interpolated to the size of the labels. ``n`` is the
    number of labelled images, or pixels, in the micro-batch, averaged over processes: a mean and a sum divided by
    ``n`` both give the mean of the global batch, whatever the gradient accumulation.

    Args:
        compute_loss_func: Returns a scalar; ``None`` for the built-in loss.
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`; its network is read when a loss is computed.
    """
    if compute_loss_func is None:
        return None

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.float()
        if logits.dim() == 4:
            logits = resize_logits(logits, labels.shape[-2:])
        labels = labels if labels.is_floating_point() else labels.long()
        count = count_selected(_has_label(labels, trainer.network.config.is_multi_label))
        return compute_loss_func(MultiExitOutput(logits=logits), labels, num_items_in_batch=count)

    return loss


def _has_label(labels: Tensor, is_multi_label: bool) -> Tensor:
    """Return which images, or pixels, have a label."""
    if is_multi_label:
        return is_known(labels).any(dim=1)
    return labels.sum(dim=1) > 0 if labels.is_floating_point() else labels != -100


def check_used(losses: Sequence[Tensor], trainer: Trainer) -> None:
    """Raise ValueError if the trainer's own label loss was never computed.

    Args:
        losses: Those that it returned in a step.
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`.
    """
    if trainer.label_loss is not None and not losses:
        name = "class_weights" if trainer.compute_loss_func is None else "compute_loss_func"
        raise ValueError(
            f"{name} has no effect on {type(trainer.method).__name__}, which does not take its label loss from "
            f"hf_selfkd.functional.cross_entropy. Call that in the method, or leave {name} out."
        )
