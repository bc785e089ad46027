"""The papers' recipes beyond the stock Trainer: learning-rate milestones, mixing, groups of weight decay."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from ..functional import smooth_labels
from ..methods.base import multi_exit_model
from .seeded_data import drawn_under
from .streaming import SeededStream


class MilestoneLR(LambdaLR):
    """Multiply the learning rate by a factor at each milestone, after a linear warm-up.

    Args:
        optimizer: The optimizer.
        milestones: Steps from which the learning rate is multiplied by ``gamma`` once more.
        gamma: Factor at each milestone.
        warmup_steps: Steps over which the learning rate rises.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> scheduler = MilestoneLR(optimizer, [2, 3], gamma=0.5, warmup_steps=1)
        >>> [scheduler.factor(step) for step in range(4)]
        [0.5, 1.0, 0.5, 0.25]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, milestones: Sequence[int], gamma: float, warmup_steps: int):
        self.milestones = tuple(milestones)
        self.gamma = gamma
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate at a step."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return warmup * self.gamma ** sum(step >= milestone for milestone in self.milestones)


def milestone_scheduler(trainer: Trainer, num_training_steps: int, optimizer=None) -> MilestoneLR:
    """Build the scheduler of a trainer from its ``lr_milestones``, which are in epochs.

    Raises:
        ValueError: If the training data has no length, and therefore no epochs.
    """
    args, data = trainer.args, trainer.train_dataset
    if not has_length(data):
        raise ValueError(
            "lr_milestones are in epochs, but the training data has no length. Use lr_scheduler_type, or data with a "
            "length."
        )
    if isinstance(data, SeededStream):
        epochs = stream_epochs(trainer, num_training_steps)
    else:
        epochs = args.num_train_epochs if args.max_steps <= 0 else trainer.state.num_train_epochs
    milestones = [round(epoch * num_training_steps / epochs) for epoch in trainer.lr_milestones]
    warmup_steps = args.get_warmup_steps(num_training_steps)
    return MilestoneLR(optimizer or trainer.optimizer, milestones, trainer.lr_gamma, warmup_steps)


def stream_epochs(trainer: Trainer, steps: int) -> float:
    """Return the number of epochs of the training stream, whose length must be known, in ``steps`` steps."""
    return steps * trainer.get_total_train_batch_size(trainer.args) / len(trainer.train_dataset)


def measured_in_steps(trainer: Trainer, args: TrainingArguments) -> TrainingArguments:
    """Return arguments with ``max_steps`` instead of epochs of the training stream, whose length must be known."""
    if args.max_steps <= 0:
        args = copy.copy(args)
        args.max_steps = math.ceil(args.num_train_epochs / stream_epochs(trainer, 1))
    return args


def mixed(trainer: Trainer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a training batch after the trainer's ``mix`` and label smoothing.

    Each process mixes its own batch, under random states that depend on seed, step and process only.

    Args:
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`.
        images: ``(batch, channels, height, width)``.
        labels: As :func:`~hf_selfkd.functional.cross_entropy` takes them.
    """
    args = trainer.args
    if trainer.mix is not None:
        step = (trainer.state.global_step, trainer.seed_data.micro_step)
        with drawn_under(args.seed, *step, args.process_index):
            images, labels = trainer.mix(images, labels)
    if args.label_smoothing_factor:
        labels = smooth_labels(labels, trainer.network.config.num_labels, args.label_smoothing_factor)
    return images, labels


def decayed_parameters(model: nn.Module) -> list[str]:
    """List the parameters with weight decay by timm's convention.

    Those with more than one dimension that are not biases, except the ones in the backbone's ``no_weight_decay()``.
    """
    backbone = multi_exit_model(model).backbone
    names = getattr(backbone, "no_weight_decay", set)()
    excluded = {id(parameter) for name, parameter in backbone.named_parameters() if name in names}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not name.endswith(".bias") and id(parameter) not in excluded
    ]
