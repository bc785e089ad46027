"""Where labels are looked for, and the name that a refused one has; which are refused: tests/models/test_labels.py."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_selfkd import SelfDistillationTrainer
from tests.helpers.runs import check_of, same_weights

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

    options = {"train_dataset": converted(Tensor.tolist), "eval_dataset": None}
    trainer = train(build_segmenter(), "none", max_steps=1, trainer_kwargs=options)
    kinds = (torch.clone, Tensor.tolist, lambda labels: labels[None].byte())
    losses = [trainer.evaluate(converted(convert))["eval_loss"] for convert in kinds]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(("name", "index"), [("training", 19), ("evaluation", 0)])
def test_labels_are_checked_before_the_first_step(build, images, train, name, index):
    wrong = [image | {"labels": 5 if at == index else image["labels"]} for at, image in enumerate(images)]
    model = build()
    before = copy.deepcopy(model)
    data = {"train_dataset": wrong} if name == "training" else {"eval_dataset": {"a": images, "b": wrong}}
    with pytest.raises(ValueError, match=f"^Sample {index} of the {name} data has label 5"):
        train(model, "none", trainer_kwargs=data, max_steps=1)
    assert same_weights(model, before)


def masks(foreground):
    labels = torch.zeros(4, 32, 32, dtype=torch.uint8)
    labels[:, :16] = foreground
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": label} for label in labels]


@pytest.mark.parametrize("foreground", [255, 1])
@pytest.mark.parametrize("trains", [True, False])
def test_a_class_that_never_occurs_while_pixels_are_ignored_is_named_once(
    build_segmenter, train, caplog, monkeypatch, tmp_path, foreground, trains
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_selfkd"), "propagate", True)
    data = masks(foreground)
    options = {"train_dataset": data, "eval_dataset": data}
    model = build_segmenter(num_labels=2)
    if trains:
        trainer = train(model, "none", trainer_kwargs=options, num_train_epochs=2, eval_strategy="epoch")
    else:
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
        trainer = SelfDistillationTrainer(model, args, "none", **options)
        trainer.evaluate()
    trainer.evaluate()
    found = [record.getMessage() for record in caplog.records if "No pixel of class" in record.getMessage()]
    if foreground == 1:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith("No pixel of class 1 was seen, but pixels with semantic_loss_ignore_index=255 were")
