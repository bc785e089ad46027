"""From the data of a run to batches."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate
from transformers import TrainingArguments

from hf_selfkd.tasks import TASKS
from hf_selfkd.training.batches import add_indices, normalise, prepare_batch, seeded
from hf_selfkd.training.seeded_data import SeededDataset
from hf_selfkd.training.settings import swapped


class Stream(IterableDataset):
    """Images in their order."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        yield from self.images

    def __len__(self):
        return len(self.images)


@pytest.fixture
def trainer(build):
    """Return the part of a trainer that the data depends on."""
    return SimpleNamespace(args=TrainingArguments(use_cpu=True, seed=3), network=build(), sigterm=None)


def test_indexed_data_is_seeded(images, trainer):
    data = seeded(images, trainer, "training", 5)
    assert isinstance(data, SeededDataset)
    assert (data.seed, data.check_label.config, data.check_label.name) == (3, trainer.network.config, "training")
    assert data.check_label.task is TASKS["image-classification"]
    assert isinstance(data.epoch, torch.Tensor)  # shared with workers
    assert seeded(images, trainer, "evaluation").epoch == 0
    both = seeded({"a": images, "b": images[:3]}, trainer, "evaluation")
    assert {name: len(part) for name, part in both.items()} == {"a": 20, "b": 3}


def test_other_data_is_left_as_it_is(images, trainer):
    for data in (None, "a", Stream(images), iter(images)):
        assert seeded(data, trainer, "evaluation") is data


def test_batches_have_indices_whatever_collates_them(images, trainer):
    loader = DataLoader(seeded(images, trainer, "training", 5), batch_size=4, collate_fn=default_collate)
    assert [batch["sample_indices"].tolist() for batch in add_indices(loader)][1] == [4, 5, 6, 7]


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2}, {"remove_unused_columns": False}])
def test_training_batches_have_indices(build, images, train, options):
    trainer = train(build(), "none", max_steps=1, trainer_kwargs={"eval_dataset": None}, **options)
    with swapped(trainer, is_in_train=True):
        found = torch.cat([batch["sample_indices"] for batch in trainer.get_train_dataloader()])
    assert sorted(found.tolist()) == list(range(20))


def test_uint8_images_are_normalised(build):
    pixels = torch.randint(256, (8, 3, 4, 4), dtype=torch.uint8)
    config = build().config
    config.pretrained_cfg |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).view(2, 3, 1, 1)
    torch.testing.assert_close(normalise(pixels, config), (pixels / 255 - mean) / std)
    with pytest.raises(ValueError, match="has mean and std of 3 channels, but the uint8 images have 1"):
        normalise(pixels[:, :1], config)
    config.pretrained_cfg = None
    with pytest.raises(ValueError, match="has mean and std of 0 channels, but the uint8 images have 3"):
        normalise(pixels, config)


def test_integers_and_floats_train_the_same(build, train):
    pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    found = []
    for images in (pixels, normalise(pixels, build().config)):
        samples = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images)]
        trainer = train(build(), trainer_kwargs={"train_dataset": samples, "eval_dataset": samples})
        found.append(trainer.state.log_history[0]["loss"])
        found.append(trainer.evaluate()["eval_loss"])
    assert found[:2] == pytest.approx(found[2:], rel=1e-4)


def test_ignored_pixels_become_those_without_a_label(build_segmenter):
    config = build_segmenter(semantic_loss_ignore_index=11).config
    batch = {"labels": torch.tensor([[[0, 11], [3, 4]]], dtype=torch.uint8)}
    prepare_batch(batch, TASKS["image-segmentation"], config)
    assert batch["labels"].tolist() == [[[0, -100], [3, 4]]]
    batch = {"labels": torch.tensor([11, 2])}  # classes of images
    prepare_batch(batch, TASKS["image-classification"], config)
    assert batch["labels"].tolist() == [11, 2]
