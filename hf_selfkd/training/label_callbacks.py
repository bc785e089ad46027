"""Labels of a run: a few checked before the first step, and classes that never occur."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..tasks import task_of
from .batches import seeded
from .seeded_data import SeededDataset

logger = logging.get_logger(__name__)


class CheckLabels(TrainerCallback):
    """Check labels of training and evaluation data before the first step, and those of pixels in the first epoch.

    Args:
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.is_done = False
        self._occurs: Tensor | None = None  # ignored pixels, then every class

    def on_train_begin(self, args, state, control, **kwargs):
        """Draw the first sample, the last and one between: classes are often in order, so the last is the largest."""
        for name, data in (("training", self.trainer.train_dataset), ("evaluation", self.trainer.eval_dataset)):
            for part in data.values() if isinstance(data, dict) else [data]:
                checked = seeded(part, self.trainer, name)
                if isinstance(checked, SeededDataset) and len(checked):
                    checked.__getitems__(sorted({0, len(checked) // 2, len(checked) - 1}))

    def observe(self, labels: Any) -> None:
        """Note which classes occur in a batch of label maps, without waiting for the device."""
        network = self.trainer.network
        if self.is_done or not task_of(network).has_ignored_pixels:
            return
        if self._occurs is None:
            self._occurs = torch.zeros(network.config.num_labels + 1, dtype=torch.bool, device=labels.device)
        self._occurs.scatter_(0, labels.flatten().clamp(min=-1) + 1, True)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Report after the first epoch."""
        self._report()

    def on_evaluate(self, args, state, control, **kwargs):
        """Report after an evaluation outside of training."""
        if not self.trainer.is_in_train:
            self._report()

    def _report(self) -> None:
        if self.is_done or self._occurs is None:
            return
        self.is_done = True
        ignored, *occurs = (self.trainer.accelerator.reduce(self._occurs.int()) > 0).tolist()
        missing = [str(index) for index, is_seen in enumerate(occurs) if not is_seen]
        if ignored and missing:
            ignore_index = self.trainer.network.config.semantic_loss_ignore_index
            logger.warning(
                "No pixel of class %s was seen, but pixels with semantic_loss_ignore_index=%d were, and are ignored. "
                "If they are of a class, as in masks of 0 and 255, give them its index in the labels, or "
                "build the model with another semantic_loss_ignore_index, such as -100.",
                ", ".join(missing),
                ignore_index,
            )
