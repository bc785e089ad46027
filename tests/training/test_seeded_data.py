"""Samples that depend on seed, epoch and index only."""

import os
import pickle
import random
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from hf_selfkd.training.seeded_data import IndexedCollator, SeededDataset, drawn_under
from tests.helpers.runs import Augmented, check_of


def seeded(samples, **options):
    return SeededDataset(samples, 0, check_of(5, "training"), **options)


def test_augmentation_differs_between_epochs_and_images(images):
    dataset = seeded(Augmented(images))
    state = torch.get_rng_state(), random.getstate()
    first = dataset[0]["pixel_values"]
    assert torch.equal(dataset[0]["pixel_values"], first)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    noise = first - images[0]["pixel_values"]
    assert not torch.allclose(dataset[1]["pixel_values"] - images[1]["pixel_values"], noise)
    dataset.share_epoch()
    dataset.epoch.fill_(1)
    assert not torch.allclose(dataset[0]["pixel_values"], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_see_the_epoch_change(images, workers):
    dataset = seeded(Augmented(images))
    dataset.share_epoch()
    loader = DataLoader(dataset, batch_size=5, num_workers=workers, persistent_workers=workers > 0)
    for epoch in range(2):
        dataset.epoch.fill_(epoch)
        found = torch.cat([batch["pixel_values"] for batch in loader])
        expected = torch.stack([dataset[index]["pixel_values"] for index in range(20)])
        assert torch.equal(found, expected)


class Balanced(Augmented):
    """Data with attributes of its own, one of which pickling would find."""

    targets = (0, 1)

    def __getstate__(self):
        raise AssertionError("asked for by the copy of another object")


def test_samplers_see_the_attributes_of_the_data(images):
    dataset = seeded(Balanced(images))
    assert dataset.targets == (0, 1)
    assert not hasattr(dataset, "column_names")
    assert not hasattr(SeededDataset.__new__(SeededDataset), "targets")
    with pytest.raises(AttributeError):
        dataset.__getattr__("__getstate__")
    assert pickle.loads(pickle.dumps(seeded(images)))[3]["labels"] == images[3]["labels"]


def test_draws_depend_on_all_of_the_entropy():
    def draw(*entropy):
        with drawn_under(*entropy):
            return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(2, 1), draw(1, 2, 1), draw(0, 1, 2)}) == 4


@pytest.mark.parametrize("error", [OSError, TypeError, SyntaxError, KeyError, MemoryError])
def test_a_sample_that_cannot_be_read_is_named(error):
    class Broken:
        def __getitem__(self, index):
            raise error("broken PNG file")

    with pytest.raises(ValueError, match="^Sample 4 of the training data cannot be read: .*broken PNG file"):
        seeded(Broken())[4]


def test_labels_are_checked(images):
    images[7]["labels"] = 5
    data = seeded(images)
    assert data[6]["labels"] == 1
    with pytest.raises(ValueError, match="Sample 7 of the training data has label 5"):
        data[7]


def test_a_batch_has_the_indices_of_its_samples(images):
    loader = DataLoader(seeded(images), batch_size=3, collate_fn=IndexedCollator(default_collate))
    assert [batch["sample_indices"].tolist() for batch in loader][1] == [3, 4, 5]
    assert "sample_indices" not in IndexedCollator(default_collate)(images[:3])
    assert IndexedCollator(lambda samples: len(samples))(seeded(images).__getitems__([0, 1])) == 2


@pytest.mark.parametrize("outlives", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_workers_outlive_the_first_sigterm_where_it_is_handled(images, outlives):
    """A scheduler sends SIGTERM to all processes; the main one still needs a batch to end its step."""
    data = seeded(images, outlives_sigterm=outlives)
    loader = iter(DataLoader(data, batch_size=2, num_workers=1, prefetch_factor=1))
    next(loader)
    (worker,) = loader._workers
    os.kill(worker.pid, signal.SIGTERM)
    if outlives:
        assert len(list(loader)) == 9
        worker.join(10)
        assert worker.exitcode == 0
    else:
        with pytest.raises((RuntimeError, OSError)):  # torch's, or that of the connection on which a batch is awaited
            list(loader)
