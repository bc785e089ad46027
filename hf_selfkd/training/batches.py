"""From the data of a run to batches: samples are checked and seeded, batches normalised."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms.v2.functional import normalize, to_dtype
from transformers import PreTrainedConfig, Trainer
from transformers.trainer_utils import has_length

from ..tasks import Task, task_of
from .label_checks import CheckedCollator, LabelCheck
from .seeded_data import IndexedCollator, SeededDataset
from .streaming import SeededStream


def seeded(dataset: Any, trainer: Trainer, name: str, batch_size: int | None = None) -> Any:
    """Return data whose samples are checked, and drawn under random states of seed, epoch and index only.

    Data without an index is returned unchanged, unless it is a :class:`~hf_selfkd.training.SeededStream`; in a
    dictionary of datasets each one is seeded.

    Args:
        dataset: Training, evaluation or test data of the trainer, or the name of a part of it.
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`.
        name: Name of the data in errors.
        batch_size: Images per batch of this process, in training only.
    """
    if isinstance(dataset, dict):
        return {key: seeded(part, trainer, name, batch_size) for key, part in dataset.items()}
    args = trainer.args
    check = _label_check(trainer, name)
    outlives_sigterm = trainer.sigterm is not None
    if isinstance(dataset, SeededStream):
        share = None if batch_size is None else (args.process_index, args.world_size, batch_size)
        return dataset.prepared(args.seed, check, share, outlives_sigterm=outlives_sigterm)
    if not is_indexed(dataset):
        return dataset
    data = SeededDataset(dataset, args.seed, check, outlives_sigterm=outlives_sigterm)
    if batch_size is not None:
        data.share_epoch()
    return data


def checked_collator(trainer: Trainer, name: str) -> dict[str, CheckedCollator]:
    """Return the trainer's collator, as the attribute that it replaces, with a check of the labels of its batches.

    Arguments as for :func:`seeded`.
    """
    return {"data_collator": CheckedCollator(trainer.data_collator, _label_check(trainer, name))}


def _label_check(trainer: Trainer, name: str) -> LabelCheck:
    network = trainer.network
    return LabelCheck(task_of(network), network.config, name)


def is_indexed(dataset: Any) -> bool:
    """Whether data has a length and samples at indices from 0; a stream has not, nor has the name of a dataset."""
    if isinstance(dataset, (str, IterableDataset)):
        return False
    return hasattr(dataset, "__getitem__") and has_length(dataset)


def add_indices(loader: DataLoader) -> DataLoader:
    """Add the indices of its samples to each batch of a loader, which is returned."""
    base = getattr(loader, "base_dataloader", loader)  # of Accelerate's
    base.collate_fn = IndexedCollator(base.collate_fn)  # after the removal of columns, which loses the indices
    return loader


def prepare_batch(batch: dict[str, Any], task: Task, config: PreTrainedConfig) -> None:
    """Normalise uint8 images of a batch, and prepare its labels as the task needs them, in place."""
    images, labels = batch.get("pixel_values"), batch.get("labels")
    if images is not None and images.dtype == torch.uint8:
        batch["pixel_values"] = normalise(images, config)
    if labels is not None:
        batch["labels"] = task.convert_labels(labels, config, "A batch", check_values=False)


def normalise(images: Tensor, config: PreTrainedConfig) -> Tensor:
    """Convert uint8 images to float32, normalised by mean and standard deviation in ``config.pretrained_cfg``.

    Args:
        images: ``(batch, channels, height, width)``, integers from 0 to 255.
        config: Configuration of the model.

    Raises:
        ValueError: If mean and standard deviation are not those of as many channels.
    """
    mean, std = ((config.pretrained_cfg or {}).get(name, ()) for name in ("mean", "std"))
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"config.pretrained_cfg has mean and std of {len(mean)} channels, but the uint8 images have "
            f"{images.shape[1]}. Normalise them in your transform, or correct mean and std."
        )
    return normalize(to_dtype(images, torch.float32, scale=True), mean, std, inplace=True)


class Batches:
    """Batches of a data loader, on the trainer's device; each loop over them starts again.

    Without the samples that Accelerate repeats at the end so that all processes have equally many.
    """

    def __init__(self, trainer: Trainer, dataloader: DataLoader):
        self.trainer = trainer
        self.dataloader = dataloader

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        loader = self.trainer.accelerator.gradient_state
        for batch in self.dataloader:
            batch = self.trainer._prepare_inputs(batch)
            size = len(batch["pixel_values"])
            if loader.end_of_dataloader and loader.remainder > 0:
                size = min(size, max(0, loader.remainder - size * self.trainer.args.process_index))
            if size:
                yield {name: values[:size] for name, values in batch.items()}
