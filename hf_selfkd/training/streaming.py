"""Training data larger than the disk: a stream that is shared by processes and their workers."""

import copy
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from .distributed import on_any_process
from .label_checks import LabelCheck
from .seeded_data import SeededDataset

# What the stock loader of a stream is configured by; the batches of a stream are never short, so none is dropped.
_LOADER_SETTINGS = (
    *("batch_size", "collate_fn", "num_workers", "pin_memory", "persistent_workers"),
    *("multiprocessing_context", "prefetch_factor", "in_order"),
)


class SeededStream(IterableDataset):
    """Samples from the rows of a streamed dataset, drawn under random states of seed, epoch and row only.

    In training every epoch is one pass in a new order: shards are shuffled and dealt to processes, within each to
    workers, and their rows are mixed in a buffer. Each row comes once, except for filling up: the last batch of a
    worker is filled with that worker's first rows, and a process that finishes early repeats its own images until all
    have finished. With fewer shards than processes every process reads all of them and keeps its share of the rows.

    The order depends on the number of processes and workers; the random draws for a row do not.

    Args:
        rows: A ``datasets.IterableDataset``, its images not decoded.
        transform: From a row to a sample with ``pixel_values`` and ``labels``.
        key: From a row to bytes that identify it, such as those of its image.
        num_rows: Number of rows, so that a run can be measured in epochs; ``None`` if it is not known.
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
        check_label: LabelCheck,
        share: tuple[int, int, int] | None = None,
        *,
        outlives_sigterm: bool = False,
    ) -> "SeededStream":
        """Return the stream for a run; each sample is checked, see :class:`SeededDataset`.

        Args:
            seed: Seed of the run.
            check_label: Check of each sample's label; errors identify a row by the checksum of its key.
            share: In training: index of this process, number of processes, and batch size.
            outlives_sigterm: Whether workers survive the first SIGTERM.
        """
        stream = copy.copy(self)
        stream.share = share
        row = _CurrentRow(self.transform)
        stream._seeded = SeededDataset(row, seed, check_label, outlives_sigterm=outlives_sigterm)
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
        for row in mine:  # datasets shares them out to the workers
            count += 1
            if len(first) < batch_size:
                first.append(row)
            yield self._draw(row)
        yield from map(self._draw, itertools.islice(itertools.cycle(first), -count % batch_size))

    def _draw(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._seeded is None:
            return self.transform(row)
        self._seeded.dataset.row = row
        return self._seeded[zlib.crc32(self.key(row))]


class _CurrentRow(Dataset):
    """The row that is being drawn, as a dataset with this sample at every index."""

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
        loader: Yields the batches of this process.
        multiple: Batches per step: the number of batches is a multiple of it.
    """

    def __init__(self, loader: DataLoader, multiple: int):
        self.loader = loader
        self.dataset = loader.dataset
        self.multiple = multiple
        self.skip = 0
        self.position = (0, 0)  # where a resumed run continues: epoch, and number of its batches that are done
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.dataset.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch = int(self.dataset.epoch)
        skip, self.skip = self.skip, 0
        for count, (batch, is_last) in enumerate(_mark_last(self._evened()), start=1):
            self.position = (epoch + 1, 0) if is_last else (epoch, count)
            if count > skip:
                yield batch

    def _evened(self) -> Iterator[dict[str, Tensor]]:
        """Yield the own batches, then repeat them until no process has any left, at the end of a step."""
        own, is_own = iter(self.loader), True
        for count in itertools.count():
            batch = next(own, None)
            is_own = is_own and batch is not None
            if not is_own and count == 0:
                raise ValueError(
                    "A process received no row of the stream. Use fewer processes, or data in more shards."
                )
            if count % self.multiple == 0 and not on_any_process(is_own, group=self._group):
                return
            if batch is None:
                own = iter(self.loader)
                batch = next(own)
            yield batch


def _mark_last(items: Iterator) -> Iterator[tuple[Any, bool]]:
    """Yield each item, and whether it is the last one; reads one ahead.

    Example:
        >>> list(_mark_last(iter("ab")))
        [('a', False), ('b', True)]
    """
    end = object()
    item = next(items, end)
    while item is not end:
        ahead = next(items, end)
        yield item, ahead is end
        item = ahead


def stream_dataloader(stream: SeededStream, stock: DataLoader, multiple: int) -> StreamLoader:
    """Build the training loader of a stream as the stock one is configured, without sharing its rows out once more.

    Args:
        stream: A prepared stream, see :meth:`SeededStream.prepared`.
        stock: The loader that Trainer and Accelerate build of it.
        multiple: As in :class:`StreamLoader`.
    """
    return StreamLoader(DataLoader(stream, **{name: getattr(stock, name) for name in _LOADER_SETTINGS}), multiple)


class StreamPosition(TrainerCallback, ExportableState):
    """Keeps the position in a stream in checkpoints, and measures epochs by the length of the stream.

    Attributes:
        loader: Training loader of the stream; ``None`` if the training data is not a stream.
        batches_per_epoch: Batches of one process in an epoch, ``None`` if the length is not known.
    """

    def __init__(self):
        self.loader: StreamLoader | None = None
        self.batches_per_epoch: float | None = None

    def follow(self, data: Any, loader: DataLoader, multiple: int) -> StreamLoader | None:
        """Follow the training data, if it is a stream, and return its loader.

        Args:
            data: Prepared for a run.
            loader: The loader that Trainer and Accelerate build of it.
            multiple: As in :class:`StreamLoader`.
        """
        self.loader = None
        if isinstance(data, SeededStream):
            self.loader = stream_dataloader(data, loader, multiple)
            _, processes, batch_size = data.share
            self.batches_per_epoch = None if data.num_rows is None else data.num_rows / (batch_size * processes)
        return self.loader

    def resume(self, state: TrainerState, skips_data: bool) -> int:
        """Move the loader to the position in a checkpoint, and return its epoch.

        Args:
            state: State from the checkpoint.
            skips_data: Whether to skip the batches of the epoch that are done.

        Raises:
            ValueError: If the checkpoint has no position.
        """
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None:
            raise ValueError(
                "The checkpoint was not trained on a stream. Resume with the data that it was trained on."
            )
        epoch, batches = saved["attributes"]["position"]
        self.loader.skip = batches if skips_data else 0
        return epoch

    def state(self) -> dict[str, Any]:
        """Return the entry of ``trainer_state.json``."""
        return {"args": {}, "attributes": {"position": self.loader.position if self.loader is not None else None}}

    def on_step_end(self, args, state, control, **kwargs):
        """Correct the epoch: for the trainer, one epoch lasts for the complete run."""
        if self.loader is not None:
            epoch, batches = self.loader.position
            total = self.batches_per_epoch or state.max_steps * args.gradient_accumulation_steps
            state.epoch = epoch + min(batches / total, math.nextafter(1.0, 0.0))
