"""Differences between the supported versions of transformers that training depends on, each with its reason."""

from transformers import Trainer


def exclude_step_from_train_loss(trainer: Trainer) -> None:
    """Exclude a skipped step from ``train_loss``.

    From transformers 5.19 it is the mean over the steps since a private field, before over all steps of the run,
    those before resuming included; then the skipped step counts as well.
    """
    if hasattr(trainer, "_initial_global_step"):
        trainer._initial_global_step += 1
