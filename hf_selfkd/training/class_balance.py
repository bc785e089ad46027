"""Classes of different sizes: weights of the label terms, and sampling of every class equally often."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..functional import weighted_cross_entropy
from ..models.labels import as_classes
from ..tasks import task_of
from .batches import seeded
from .label_checks import LabelCheck, label_name
from .seeded_data import SeededDataset

# Weights that a card lists one by one.
_MAX_SHOWN = 10

logger = logging.get_logger(__name__)


class ClassBalance(TrainerCallback):
    """Class weights and balanced sampling of a run.

    Args:
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`.
        weights: One weight per class; ``"balanced"`` for ``n / (k n_c)``, with ``n_c`` of ``n`` labels in class ``c``
            and ``k`` classes that occur, so that their mean over the data is 1; ``None`` for no weights.
        sampling: Whether to sample every class equally often.

    Raises:
        ValueError: If one of them contradicts another setting, or does not suit the model or the data.
    """

    def __init__(self, trainer: Trainer, weights: str | Sequence[float] | None, sampling: bool):
        self.trainer = trainer
        self.given = None if weights is None else self._checked_weights(weights)
        self.sampling = sampling
        if sampling:
            self._check_sampling()
        if isinstance(self.given, str) or sampling:
            self._check_data("balanced_sampling" if sampling else 'class_weights="balanced"')
        self._weights: Tensor | None = None
        self._sampler: BalancedSampler | None = None

    @property
    def description(self) -> str | list[float] | None:
        """The weights for the model card: one by one, if there are few."""
        if not isinstance(self.given, Tensor):
            return self.given
        return self.given.tolist() if len(self.given) <= _MAX_SHOWN else f"{len(self.given)} weights"

    def _checked_weights(self, weights: str | Sequence[float]) -> Tensor | str:
        if self.trainer.compute_loss_func is not None:
            raise ValueError(
                "class_weights weigh the cross-entropy, which compute_loss_func replaces. Pass one of the two."
            )
        if self.trainer.network.task not in ("image-classification", "image-segmentation"):
            raise ValueError(
                f"class_weights weigh the cross-entropy, which models for {self.trainer.network.task} are not trained "
                "with. Pass compute_loss_func, such as a BCEWithLogitsLoss with pos_weight."
            )
        if isinstance(weights, str):
            if weights != "balanced":
                raise ValueError(f"class_weights takes one weight per class or 'balanced', but got {weights!r}.")
            return weights
        weights, num_labels = torch.as_tensor(weights, dtype=torch.float32), self.trainer.network.config.num_labels
        if weights.shape != (num_labels,) or not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
            raise ValueError(
                f"class_weights must be {num_labels} weights of at least 0, one per class and not all 0, but got "
                f"{weights.tolist()}."
            )
        return weights

    def _check_sampling(self) -> None:
        task, strategy = self.trainer.network.task, self.trainer.args.train_sampling_strategy
        if task != "image-classification":
            raise ValueError(
                f"balanced_sampling samples images by their class, but those for {task} have several. Use "
                "class_weights='balanced'."
            )
        if strategy != "random":
            raise ValueError(
                f"balanced_sampling and train_sampling_strategy={strategy!r} both decide which samples are drawn. Set "
                "one of the two."
            )
        if isinstance(self.given, str):
            raise ValueError(
                "balanced_sampling and class_weights='balanced' both correct the sizes of the classes, which together "
                "favours the small ones. Set one of the two."
            )

    def _check_data(self, argument: str) -> None:
        data = self.trainer.train_dataset
        if data is not None and (isinstance(data, IterableDataset) or not has_length(data)):
            raise ValueError(
                f"{argument} reads the labels of all training samples before training, but the training data "
                f"({type(data).__name__}) is a stream. Pass one weight per class as class_weights."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        """Weigh the label loss."""
        if self.given is None:
            return
        if self._weights is None:
            by_frequency, num_labels = isinstance(self.given, str), self.trainer.network.config.num_labels
            self._weights = balanced_weights(read_labels(self.trainer), num_labels) if by_frequency else self.given
        weights = self._weights.to(args.device)
        self.trainer.label_loss = partial(weighted_cross_entropy, class_weights=weights)

    def sampler(self) -> "BalancedSampler | None":
        """Return the sampler of the training data, ``None`` for the stock one."""
        if self.sampling and self._sampler is None:
            classes = torch.cat([as_classes(labels) for labels in read_labels(self.trainer)])
            seed = self.trainer.args.seed if self.trainer.args.data_seed is None else self.trainer.args.data_seed
            self._sampler = BalancedSampler(classes, seed)
        return self._sampler


class BalancedSampler(WeightedRandomSampler):
    """Draw as many samples as there are, with replacement, from every class equally often.

    Samples without a label count as one more class. The draws depend on seed and epoch only, so that they are equal on
    all processes and in a run that is resumed.

    Args:
        classes: Class of each sample ``(samples,)``, -100 where there is no label.
        seed: Seed of the run.
    """

    def __init__(self, classes: Tensor, seed: int):
        _, of_sample, counts = classes.unique(return_inverse=True, return_counts=True)
        super().__init__(1 / counts[of_sample].double(), len(classes))
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of an epoch."""
        seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint32)[0]
        self.generator = torch.Generator().manual_seed(int(seed))


def balanced_weights(batches: Iterator[Tensor], num_labels: int) -> Tensor:
    """Return the weights ``n / (k n_c)`` of the classes ``(classes,)``, 0 for classes that do not occur.

    As scikit-learn's ``class_weight="balanced"``, whose heuristic is that of King & Zeng, "Logistic Regression in Rare
    Events Data", 2001.

    Args:
        batches: Labels as the task converts them; probabilities count as shares of a label.
        num_labels: Number of classes.
    """
    counts = torch.zeros(num_labels, dtype=torch.float64)
    for labels in batches:
        if labels.is_floating_point():
            counts += labels.double().sum(dim=0)
        else:
            counts += labels[labels >= 0].bincount(minlength=num_labels)
    occurs = counts > 0
    weights = counts.sum() / (occurs.sum() * counts.where(occurs, 1))
    return weights.where(occurs, 0).float()


def read_labels(trainer: Trainer) -> Iterator[Tensor]:
    """Yield the labels of all training samples in their order, in batches, as the task converts them.

    Of a ``datasets.Dataset`` the column of the label is read, unless its transform changes it. Of other data every
    sample is drawn once, by the workers of the data loader.
    """
    data = trainer.train_dataset
    data = data.dataset if isinstance(data, SeededDataset) else data
    data = _label_column(data, trainer) or data
    if not isinstance(data, datasets.Dataset):
        logger.warning("Reading all %d training samples once for their labels.", len(data))
    yield from DataLoader(
        seeded(data, trainer, "training"),
        batch_size=trainer.args.train_batch_size,
        num_workers=trainer.args.dataloader_num_workers,
        collate_fn=_LabelsOnly(trainer),
    )


def _label_column(data: Any, trainer: Trainer) -> datasets.Dataset | None:
    """Return the column of the label, as it is stored; ``None`` if it is not what samples have."""
    name = label_name(dict.fromkeys(data.column_names)) if isinstance(data, datasets.Dataset) else None
    if name is None:
        return None
    stored = data.with_format(None).select_columns([name])
    only_labels, drawn = _LabelsOnly(trainer), seeded(data, trainer, "training")
    for index in {0, len(data) // 2, len(data) - 1}:
        try:
            is_equal = torch.equal(only_labels([stored[index]]), only_labels([drawn[index]]))
        except ValueError:  # an image of labels, for example, that the transform turns into an array
            is_equal = False
        if not is_equal:
            return None
    return stored


class _LabelsOnly:
    """Collate the labels of samples alone, converted."""

    def __init__(self, trainer: Trainer):
        network = trainer.network
        self.check = LabelCheck(task_of(network), network.config, "training")
        self.collate = trainer.data_collator

    def __call__(self, samples: list) -> Tensor:
        if any(label_name(sample) is None for sample in samples):
            return self.check.convert(self.collate(samples)["labels"])
        return torch.cat([self.check.convert([sample[label_name(sample)]]) for sample in samples])
