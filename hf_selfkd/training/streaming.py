"""Training data larger than the disk: a stream that processes and their workers share."""

import copy
import math
import zlib
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from .seeded_data import SeededDataset


class SeededStream(IterableDataset):
    """Rows of a streamed data set, made samples under random states that depend on seed, epoch and row only.

    In training every epoch is one pass in a new order: shards are shuffled and dealt to processes, within each to
    workers, and their rows are mixed in a buffer. Each row comes once, but for those that fill up: the last batch of a
    worker with that worker's first rows, and a process that is done early with its own images until all are. With
    fewer shards than processes every process reads all of them and keeps its share of the rows.

    The order depends on the number of processes and workers; what is drawn for a row does not.

    Args:
        rows: A ``datasets.IterableDataset``, its images not decoded.
        transform: From a row to a sample with ``pixel_values`` and ``labels``.
        key: From a row to the bytes that tell it from others, such as those of its image.
        num_rows: Their number, so that a run can be measured in epochs; ``None`` if it is not known.
        buffer_size: Rows that each worker mixes at a time in training.
    """

    def __init__(
        self,
        rows: Any,
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        key: Callable[[dict[str, Any]], bytes],
        *,
        num_rows: int | None = None,
        buffer_size: int = 1000,
    ):
        self.rows = rows
        self.transform = transform
        self.key = key
        self.num_rows = num_rows
        self.buffer_size = buffer_size
        self.epoch = torch.zeros((), dtype=torch.long)
        self.share: tuple[int, int, int] | None = None
        self._seeded: SeededDataset | None = None

    def __len__(self) -> int:
        if self.num_rows is None:
            raise TypeError("The number of rows of this stream is not known.")
        return self.num_rows

    def prepared(
        self,
        seed: int,
        num_labels: int,
        name: str,
        ignore_index: int = 255,
        share: tuple[int, int, int] | None = None,
    ) -> "SeededStream":
        """Return the stream with what a run knows; each sample is checked, see :class:`SeededDataset`.

        Args:
            seed: Of the run.
            num_labels: Class indices in ``labels`` must be below it.
            name: What the data is called in errors, which name a row by the checksum of its key.
            ignore_index: What void pixels of label maps are marked with, beside -100.
            share: In training: this process, of how many, and the size of its batches.
        """
        stream = copy.copy(self)
        stream.share = share
        stream._seeded = SeededDataset(_CurrentRow(self.transform), seed, num_labels, name, ignore_index)
        if share is not None:
            stream._seeded.share_epoch()
        stream.epoch = stream._seeded.epoch
        return stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.share is None:
            yield from map(self._draw, self.rows)
            return
        process, processes, batch_size = self.share
        rows = self.rows.shuffle(seed=[self._seeded.seed, int(self.epoch)], buffer_size=self.buffer_size)
        enough = rows.num_shards >= processes
        mine = rows.shard(processes, process) if enough else split_dataset_by_node(rows, process, processes)
        first, count = [], 0
        for row in mine:  # datasets gives each worker its part
            count += 1
            if len(first) < batch_size:
                first.append(row)
            yield self._draw(row)
        yield from map(self._draw, islice(cycle(first), -count % batch_size))

    def _draw(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._seeded is None:
            return self.transform(row)
        self._seeded.dataset.row = row
        return self._seeded[zlib.crc32(self.key(row))]


class _CurrentRow(Dataset):
    """The row that is drawn, as a data set whose only sample it is, whatever its index."""

    def __init__(self, transform: Callable[[dict[str, Any]], dict[str, Any]]):
        self.transform = transform
        self.row: dict[str, Any] = {}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.transform(self.row)


class StreamLoader:
    """Batches of a process's part of a stream; all processes get as many as the one with the most.

    Args:
        loader: Gives this process's batches.
        multiple: Batches per step: the number of batches is a multiple of it.
    """

    def __init__(self, loader: DataLoader, multiple: int):
        self.loader = loader
        self.dataset = loader.dataset
        self.multiple = multiple
        self.skip = 0
        self.position = (0, 0)  # where a resumed run goes on: epoch, and batches of it that are behind
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.dataset.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch = int(self.dataset.epoch)
        skip, self.skip = self.skip, 0
        batches = self._evened()
        count, ahead = 0, next(batches, None)
        while ahead is not None:
            batch, ahead = ahead, next(batches, None)  # one ahead, to know the last
            count += 1
            self.position = (epoch + 1, 0) if ahead is None else (epoch, count)
            if count > skip:
                yield batch

    def _evened(self) -> Iterator[dict[str, Tensor]]:
        batches, has_own, count = iter(self.loader), True, 0
        while True:
            batch = next(batches, None)
            has_own = has_own and batch is not None
            if not has_own and count == 0:
                raise ValueError("A process got no row of the stream. Use fewer processes, or data in more shards.")
            if count % self.multiple == 0 and not self._on_any(has_own):
                return
            if batch is None:  # others are not done yet
                batches = iter(self.loader)
                batch = next(batches)
            count += 1
            yield batch

    def _on_any(self, value: bool) -> bool:
        if self._group is None:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)


class StreamPosition(TrainerCallback, ExportableState):
    """Keeps in checkpoints how far the stream is, and measures epochs by its length."""

    def __init__(self):
        self.loader: StreamLoader | None = None
        self.batches_per_epoch: float | None = None

    def state(self) -> dict[str, Any]:
        """Return what ``trainer_state.json`` holds."""
        return {"args": {}, "attributes": {"position": self.loader.position if self.loader is not None else None}}

    def on_step_end(self, args, state, control, **kwargs):
        """Correct the epoch: the trainer believes that it lasts for the whole run."""
        if self.loader is not None:
            epoch, batches = self.loader.position
            whole = self.batches_per_epoch or state.max_steps * args.gradient_accumulation_steps
            state.epoch = epoch + min(batches / whole, math.nextafter(1.0, 0.0))


class StreamingTrainer(Trainer):
    """The part of the trainer that knows streams: their share of each process, their length, their position."""

    def __init__(self, *args, **kwargs):
        self._position = StreamPosition()
        super().__init__(*args, **kwargs)
        if isinstance(self.train_dataset, SeededStream):
            self.add_callback(self._position)

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        if is_training:
            self._position.loader = None
        if isinstance(dataset, SeededStream):
            share = (self.args.process_index, self.args.world_size, batch_size) if is_training else None
            config = self.model.config
            void = config.semantic_loss_ignore_index
            dataset = dataset.prepared(self.args.seed, config.num_labels, description.lower(), void, share)
        if not is_training or not isinstance(dataset, SeededStream):
            return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        self._position.loader = StreamLoader(loader, self.args.gradient_accumulation_steps)
        if dataset.num_rows is not None:
            self._position.batches_per_epoch = dataset.num_rows / (batch_size * self.args.world_size)
        return self._position.loader

    def stream_epochs(self, steps: int) -> float:
        """Return how many epochs of the training stream, whose length must be known, so many steps are."""
        return steps * self.get_total_train_batch_size(self.args) / len(self.train_dataset)

    def set_initial_training_values(self, args, dataloader):
        """Turn epochs of a stream into steps: the stock trainer cannot, because each process has its own number."""
        if isinstance(dataloader, StreamLoader) and args.max_steps <= 0:
            args = copy.copy(args)
            args.max_steps = math.ceil(args.num_train_epochs / self.stream_epochs(1))
        return super().set_initial_training_values(args, dataloader)

    def _init_training_state(self, max_steps, *args) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, *args)
        if self._position.loader is None or not 0 < self.state.global_step < max_steps:
            return begun
        if StreamPosition.__name__ not in self.state.stateful_callbacks:
            raise ValueError(
                "The checkpoint was not trained on a stream. Resume with the data that it was trained on."
            )
        epoch, batches = self.state.stateful_callbacks[StreamPosition.__name__]["attributes"]["position"]
        if not self.args.ignore_data_skip:
            self._position.loader.skip = batches
        return epoch, 0
