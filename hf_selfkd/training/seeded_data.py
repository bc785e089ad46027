"""Training samples that depend on seed, epoch and index only."""

import random
import signal
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from .label_checks import LabelCheck

# Entry of a batch with the indices of its samples.
INDICES = "sample_indices"


class Samples(list):
    """Samples of a batch, and their indices."""

    def __init__(self, samples: list[dict[str, Any]], indices: list[int]):
        super().__init__(samples)
        self.indices = indices


class IndexedCollator:
    """Collate samples, and add their indices to the batch as ``sample_indices``, ``(batch,)``.

    Args:
        collate: Makes a batch from a list of samples.
    """

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, samples: list) -> Any:
        """Return the batch."""
        batch = self.collate(samples)
        if isinstance(samples, Samples) and isinstance(batch, MutableMapping):
            batch[INDICES] = torch.tensor(samples.indices)
        return batch


class SeededDataset(Dataset):
    """Draw every sample under random states that depend on seed, epoch and index only.

    The stock Trainer fetches a batch ahead of the random states it saves, and workers have their own, so that a
    resumed run would see other augmentations.

    Args:
        dataset: Indexed from 0, returns dictionaries.
        seed: Seed of the run.
        check_label: Check of each sample's label; it returns the sample.
        outlives_sigterm: Whether workers survive the first SIGTERM: sent to all processes, it would cost the main
            process the batch that it needs to end its step.

    Raises:
        ValueError: If a sample cannot be read or its label is refused; the error has the index.
    """

    def __init__(self, dataset, seed: int, check_label: LabelCheck, *, outlives_sigterm: bool = False):
        self.dataset = dataset
        self.seed = seed
        self.check_label = check_label
        self.epoch: int | Tensor = 0
        self._ignores_next_sigterm = outlives_sigterm

    def share_epoch(self) -> None:
        """Make workers that stay alive see ``epoch`` change.

        For training only: it holds a file open, and Accelerate keeps every loader, so that each evaluation would add
        one.
        """
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Samples:
        """Return a batch of samples; restoring the random states once is cheaper than after each."""
        if self._ignores_next_sigterm and get_worker_info() is not None:
            self._ignores_next_sigterm = False
            signal.signal(signal.SIGTERM, _ignore_once)
        with _kept_random_states():
            return Samples([self._draw(index) for index in indices], indices)

    def _draw(self, index: int) -> dict[str, Any]:
        _seed(self.seed, int(self.epoch), index)
        try:
            sample = self.dataset[index]
        except Exception as error:  # decoders raise all kinds
            raise ValueError(f"Sample {index} of the {self.check_label.name} data cannot be read: {error}") from error
        return self.check_label(index, sample)


@contextmanager
def drawn_under(*entropy: int) -> Iterator[None]:
    """Draw under random states that depend on ``entropy`` only, then restore the states.

    Those of Python, numpy and torch on the CPU.
    """
    with _kept_random_states():
        _seed(*entropy)
        yield


def _seed(*entropy: int) -> None:
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too


@contextmanager
def _kept_random_states() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def _ignore_once(signum, frame) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
