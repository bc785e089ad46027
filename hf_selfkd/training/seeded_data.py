"""Training samples that depend on seed, epoch and index only."""

import random
import reprlib
import signal
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

# Where a batch says which samples it holds.
INDICES = "sample_indices"


class Samples(list):
    """Samples of a batch, and their indices."""

    def __init__(self, samples: list[dict[str, Any]], indices: list[int]):
        super().__init__(samples)
        self.indices = indices


class IndexedCollator:
    """Collates samples, and notes their indices in the batch as ``sample_indices``, ``(batch,)``.

    Args:
        collate: Makes a batch of a list of samples.
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
    """Draws every sample under random states that depend on seed, epoch and index only.

    The stock Trainer fetches a batch ahead of the random states it saves, and workers have their own, so that a
    resumed run would see other augmentations.

    Args:
        dataset: Indexed from 0, gives dictionaries.
        seed: Of the run.
        num_labels: Class indices in ``labels`` must be below it.
        name: What the data is called in errors.
        ignore_index: What void pixels of label maps are marked with, beside -100.

    Raises:
        ValueError: If a sample cannot be read, its label is no class, or its label map has another size than its
            image; names the index.
    """

    def __init__(self, dataset, seed: int, num_labels: int, name: str, ignore_index: int = 255):
        self.dataset = dataset
        self.seed = seed
        self.num_labels = num_labels
        self.void = (-100, ignore_index)
        self.name = name
        self.epoch: int | Tensor = 0
        self._outlives_sigterm = False

    def share_epoch(self) -> None:
        """Let workers that stay alive see ``epoch`` change.

        For training only: it holds a file open, and Accelerate never drops a loader, so that each evaluation would add
        one.
        """
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Samples:
        """Return a batch of samples; putting the random states back once is cheaper than after each."""
        if get_worker_info() is not None and not self._outlives_sigterm:
            self._outlives_sigterm = True
            signal.signal(signal.SIGTERM, _outlive)
        with _kept_random_states():
            return Samples([self._draw(index) for index in indices], indices)

    def _draw(self, index: int) -> dict[str, Any]:
        _seed(self.seed, int(self.epoch), index)
        try:
            sample = self.dataset[index]
        except Exception as error:  # decoders raise all kinds
            raise ValueError(f"Sample {index} of the {self.name} data cannot be read: {error}") from error
        self._check_label(index, sample)
        return sample

    def _check_label(self, index: int, sample: dict[str, Any]) -> None:
        name = next((name for name in ("labels", "label") if name in sample), None)  # the stock collator takes either
        if name is None:
            return  # the trainer says which columns a batch needs
        label = sample[name]
        which = f"Sample {index} of the {self.name} data"
        if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0:
            label = label.item()
        if isinstance(label, (int, np.integer)):
            if label != -100 and not 0 <= label < self.num_labels:
                raise ValueError(
                    f"{which} has label {label}, but the model has {self.num_labels} classes (0 to "
                    f"{self.num_labels - 1}). Build the model with num_labels of the data."
                )
        elif getattr(label, "ndim", 0) == 2:
            self._check_map(index, torch.as_tensor(label), sample["pixel_values"].shape[-2:])
        elif not _are_probabilities(label, self.num_labels):
            raise ValueError(
                f"{which} has the label {reprlib.repr(label)}, but a label is a class index, a map of them, or "
                f"{self.num_labels} probabilities. Give -100 where there is none."
            )

    def _check_map(self, index: int, label: Tensor, image_size: Sequence[int]) -> None:
        if label.shape != image_size:
            raise ValueError(
                f"Sample {index} of the {self.name} data has a label map of {tuple(label.shape)} pixels, but an image "
                f"of {tuple(image_size)}. Transform both together."
            )
        wrong = set(label.unique().tolist()) - set(range(self.num_labels)) - set(self.void)
        if wrong:
            raise ValueError(
                f"Sample {index} of the {self.name} data has a pixel of class {min(wrong)}, but the model has "
                f"{self.num_labels} classes (0 to {self.num_labels - 1}) and ignores {self.void[1]}. Build the model "
                "with num_labels and semantic_loss_ignore_index of the data."
            )


@contextmanager
def drawn_under(*entropy: int) -> Iterator[None]:
    """Let everything inside draw under random states that depend on ``entropy`` only, then put the states back.

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


def _are_probabilities(label: Any, num_labels: int) -> bool:
    if not isinstance(label, (list, tuple, Tensor, np.ndarray)) or len(label) != num_labels:
        return False
    return all(isinstance(value, float) for value in (label if isinstance(label, (list, tuple)) else label.tolist()))


def _outlive(signum, frame) -> None:
    """Let the first SIGTERM pass: sent to all processes, it would cost the main one the batch it still needs."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
