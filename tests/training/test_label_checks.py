"""Where labels are looked for, and the name that a refused one has; which are refused: tests/models/test_labels.py."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.runs import check_of

check = check_of(5, "training")


@pytest.mark.parametrize("name", ["labels", "label", "label_ids"])
def test_the_names_of_the_stock_collator_are_checked(name):
    check(0, {name: 4})
    with pytest.raises(ValueError, match="^Sample 7 of the training data has label 5, .* 5 classes"):
        check(7, {name: 5})


def test_a_sample_without_a_label():
    check(0, {"pixel_values": torch.zeros(3, 4, 4)})


def test_the_task_decides():
    image, labels = torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8)
    labels[0] = 11
    maps = check_of(5, "test", "image-segmentation", semantic_loss_ignore_index=11)
    maps(0, {"pixel_values": image, "labels": labels})
    with pytest.raises(ValueError, match="^Sample 0 of the training data has the label"):
        check(0, {"pixel_values": image, "labels": labels})
    maps(0, {"pixel_values": image, "labels": labels[None].tolist()})
    labels[0, 0] = 7
    with pytest.raises(ValueError, match="^Sample 2 of the test data has a pixel of class 7"):
        maps(2, {"pixel_values": image, "labels": labels})


# In a run


INTEGERS = [np.uint8, np.int16, np.uint16, np.int32, np.uint64, np.array]


@pytest.mark.parametrize("name", ["labels", "label", "int32 tensors"])
def test_every_integer_trains_and_evaluates_as_an_int(build, images, train, name):
    if name == "int32 tensors":
        data = [image | {"labels": torch.tensor(image["labels"]).int()} for image in images]
    else:
        data = [
            {"pixel_values": image["pixel_values"], name: INTEGERS[index % len(INTEGERS)](image["labels"])}
            for index, image in enumerate(images)
        ]
    trainer = train(build(), "none", trainer_kwargs={"train_dataset": data}, max_steps=1)
    expected = train(build(), "none", max_steps=1)
    assert trainer.state.log_history[0]["loss"] == expected.state.log_history[0]["loss"]
    assert trainer.evaluate(data)["eval_loss"] == expected.evaluate()["eval_loss"]


def test_images_and_labels_in_tuples_with_a_collator_of_ones_own(build, images, train):
    data = [(image["pixel_values"].numpy(), np.int32(image["labels"])) for image in images[:10]]

    def collate(samples):
        pixels, labels = zip(*samples, strict=True)
        return {"pixel_values": torch.from_numpy(np.stack(pixels)), "labels": torch.from_numpy(np.stack(labels))}

    options = {"train_dataset": data, "eval_dataset": data, "data_collator": collate}
    trainer = train(build(), "none", trainer_kwargs=options, max_steps=1)
    expected = train(build(), "none", max_steps=1, trainer_kwargs={"train_dataset": images[:10]})
    assert trainer.evaluate()["eval_loss"] == expected.evaluate(images[:10])["eval_loss"]
    data[3] = (data[3][0], np.int32(5))
    with pytest.raises(ValueError, match="^A batch of the evaluation data has label 5, but the model has 5 classes"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="^A batch of the test data has label 5"):
        trainer.predict(data)
    with pytest.raises(ValueError, match="^A batch of the training data has label 5"):
        trainer.train()


def test_label_maps_in_lists_or_with_a_channel_train(build_segmenter, train):
    labels, pixels = torch.randint(0, 5, (2, 32, 32)), torch.randn(2, 3, 32, 32)

    def converted(convert):
        return [{"pixel_values": image, "labels": convert(label)} for image, label in zip(pixels, labels, strict=True)]

    trainer = train(build_segmenter(), "none", max_steps=1, trainer_kwargs={"train_dataset": converted(Tensor.tolist)})
    kinds = (torch.clone, Tensor.tolist, lambda labels: labels[None].byte())
    losses = [trainer.evaluate(converted(convert))["eval_loss"] for convert in kinds]
    assert losses[0] == losses[1] == losses[2]
