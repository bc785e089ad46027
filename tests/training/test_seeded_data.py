"""Samples that depend on seed, epoch and index, and what is refused among them."""

import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from hf_selfkd.training.seeded_data import IndexedCollator, SeededDataset


def seeded(samples, num_labels=5):
    return SeededDataset(samples, seed=0, num_labels=num_labels, name="training")


@pytest.mark.parametrize("label", [3, -100, np.int64(4), torch.tensor(2), True, [0.2] * 5, torch.full((5,), 0.2)])
def test_labels_of_the_right_type(images, label):
    assert seeded([images[0] | {"labels": label}])[0]["labels"] is label


@pytest.mark.parametrize(
    "label", ["cat", None, 1.0, torch.tensor(1.0), [1, 0, 0, 0, 0], [0.5, 0.5], torch.zeros(5, dtype=torch.long), {}]
)
def test_labels_of_the_wrong_type_are_named(images, label):
    words = r"^Sample 1 of the training data has the label .*, but a label is a class index, a map of them, or 5 proba"
    with pytest.raises(ValueError, match=words):
        seeded([images[0], images[1] | {"labels": label}])[1]


@pytest.mark.parametrize("error", [OSError, TypeError, SyntaxError, KeyError, MemoryError])
def test_whatever_a_decoder_raises_the_sample_is_named(error):
    class Broken:
        def __getitem__(self, index):
            raise error("broken PNG file")

    with pytest.raises(ValueError, match="^Sample 4 of the training data cannot be read: .*broken PNG file"):
        seeded(Broken())[4]


def test_a_batch_knows_its_samples(images):
    loader = DataLoader(seeded(images), batch_size=3, collate_fn=IndexedCollator(default_collate))
    assert [batch["sample_indices"].tolist() for batch in loader][1] == [3, 4, 5]
    assert "sample_indices" not in IndexedCollator(default_collate)(images[:3])
    assert IndexedCollator(lambda samples: len(samples))(seeded(images).__getitems__([0, 1])) == 2


def test_workers_outlive_the_first_sigterm(images):
    """A scheduler sends SIGTERM to all processes; the main one still needs a batch to end its step."""
    loader = iter(DataLoader(seeded(images), batch_size=2, num_workers=1, prefetch_factor=1))
    next(loader)
    (worker,) = loader._workers
    os.kill(worker.pid, signal.SIGTERM)
    assert len(list(loader)) == 9
    worker.join(10)
    assert worker.exitcode == 0
