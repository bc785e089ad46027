"""Class weights reach every label term; labels are read without the images where that is possible."""

from dataclasses import replace

import datasets
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hf_selfkd import Method, get_method
from hf_selfkd.functional import label_loss, weighted_cross_entropy
from hf_selfkd.training.class_balance import BalancedSampler, balanced_weights, read_labels
from hf_selfkd.training.streaming import SeededStream
from tests.helpers.methods import METHODS
from tests.helpers.runs import losses, same_weights

LABEL_TERMS = {"label", "exits", "teacher", "students", "ensemble"}
# Of the class in a dataset of twenty images.
RARE = [0] * 16 + [3] * 4


class Unweighted(Method, registered=False):
    """Takes its label loss from torch."""

    name, paper = "unweighted", "https://example.org"

    def __call__(self, output, labels, epoch):
        return {"label": F.cross_entropy(output.logits, labels)}


@pytest.fixture
def rare(images):
    return [image | {"labels": label} for image, label in zip(images, RARE, strict=True)]


def stored(images, transform=None):
    rows = {"index": list(range(len(images))), "label": [image["labels"] for image in images]}
    return datasets.Dataset.from_dict(rows).with_transform(transform)


@pytest.mark.parametrize("name", METHODS)
def test_the_label_terms_of_every_method_are_weighted_and_no_others(build, batch, name):
    options = {"teacher": build("test_vit")} if name == "kd" else {"num_hashes": 16} if name == "lsh" else {}
    method, model = get_method(name, **options), build().train()
    method.attach(model, num_images=len(batch["labels"]))
    output = replace(model(batch["pixel_values"]), sample_indices=torch.arange(len(batch["labels"])))
    plain = method.terms(output, batch["labels"], 100.0)
    with label_loss(lambda *arguments: weighted_cross_entropy(*arguments, torch.full((5,), 2.0))):
        weighted = method.terms(output, batch["labels"], 100.0)
    assert weighted.keys() == plain.keys()
    for term, value in plain.items():
        assert_close(weighted[term], value * (2 if term in LABEL_TERMS else 1), msg=term)


@pytest.mark.parametrize("given", ["balanced", [0.625, 9.0, 9.0, 2.5, 9.0]])
def test_weights_of_a_run(build, rare, train, given):
    """Four times as many images of one class have a fourth of the weight of another, and the metrics have none."""
    kwargs = {"train_dataset": rare, "class_weights": given}
    trainer = train(build(), "deep_supervision", trainer_kwargs=kwargs, max_steps=1, per_device_train_batch_size=20)
    pixels, labels = torch.stack([sample["pixel_values"] for sample in rare]), torch.tensor(RARE)
    weights = torch.tensor([0.625, 0, 0, 2.5, 0])
    expected = sum(
        (F.cross_entropy(logits, labels, reduction="none") * weights[labels]).mean()
        for logits in build().train()(pixels).exit_logits
    )
    assert trainer.state.log_history[0]["loss/label"] == pytest.approx(expected.item(), rel=1e-4)
    with torch.no_grad():
        logits = trainer.model.eval()(pixels).logits
    assert trainer.evaluate(rare)["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_balanced_weights_have_a_mean_of_one():
    labels = [torch.tensor([0, 0, 0, 1, -100, 3]), torch.tensor([3, 3])]
    weights = balanced_weights(labels, 5)
    assert_close(weights, torch.tensor([7 / 9, 7 / 3, 0, 7 / 9, 0]))
    counts = torch.tensor([3, 1, 0, 3, 0])
    assert (weights * counts).sum() / 7 == pytest.approx(1)
    soft = F.one_hot(torch.tensor([0, 0, 0, 1, 3, 3, 3]), 5).float()
    assert_close(balanced_weights([soft], 5), weights)


def test_pixels_are_counted_in_segmentation(build_segmenter, train):
    labels = torch.zeros(32, 32, dtype=torch.uint8)
    labels[:8], labels[8:16] = 4, 255
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": labels} for _ in range(4)]
    options = {"train_dataset": data, "eval_dataset": None, "class_weights": "balanced"}
    trainer = train(build_segmenter(), "none", trainer_kwargs=options, max_steps=1)
    assert_close(trainer.label_loss.keywords["class_weights"], torch.tensor([0.75, 0, 0, 0, 1.5]))


def test_labels_of_a_column_are_read_without_the_images(build, rare, train):
    read = []

    def transform(rows):
        read.extend(rows["index"])
        pixels = [rare[index]["pixel_values"] for index in rows["index"]]
        return {"pixel_values": pixels, "labels": rows["label"]}

    options = {"train_dataset": stored(rare, transform), "class_weights": "balanced"}
    trainer = train(build(), "none", trainer_kwargs=options, remove_unused_columns=False, max_steps=1)
    read.clear()
    assert torch.cat(list(read_labels(trainer))).tolist() == RARE
    assert sorted(read) == [0, 10, 19]  # to compare
    trainer.train_dataset = stored(
        rare, lambda rows: transform(rows) | {"labels": [4 - label for label in rows["label"]]}
    )
    assert torch.cat(list(read_labels(trainer))).tolist() == [4 - label for label in RARE]


def test_a_label_that_only_the_collator_knows(build, rare, train):
    def collate(samples):
        pixels, labels = zip(*samples, strict=True)
        return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}

    data = [(sample["pixel_values"], sample["labels"]) for sample in rare]
    options = {"train_dataset": data, "eval_dataset": None, "data_collator": collate, "class_weights": "balanced"}
    trainer = train(build(), "none", trainer_kwargs=options, max_steps=1)
    assert_close(trainer.label_loss.keywords["class_weights"], torch.tensor([0.625, 0, 0, 2.5, 0]))


def test_classes_are_drawn_equally_often():
    classes = torch.tensor([0] * 900 + [1] * 90 + [-100] * 10)
    sampler = BalancedSampler(classes, seed=3)
    first = list(sampler)
    assert len(first) == 1000
    counts = classes[first].unique(return_counts=True)[1].tolist()
    assert all(280 < count < 390 for count in counts)
    assert len({index for index in first if classes[index] == 0}) > 200
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_run_with_balanced_sampling_resumes_as_it_was(build, rare, train):
    """The second epoch draws other samples than the first, and half of it is drawn again."""
    options = {"train_dataset": rare, "eval_dataset": None, "balanced_sampling": True}
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 6}
    full = train(build(), "none", trainer_kwargs=options, **settings)
    resumed = train(build(), "none", trainer_kwargs=options, resume=f"{full.args.output_dir}/checkpoint-6", **settings)
    assert losses(resumed)[-2:] == losses(full)[-2:]
    assert same_weights(resumed.model, full.model)
    drawn = [torch.cat([batch["labels"] for batch in loader]) for loader in [full.get_train_dataloader()]]
    assert 5 <= (drawn[0] == 3).sum() <= 15


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_weights": [1.0, 2.0]}, "must be 5 weights of at least 0, .* but got .1.0, 2.0."),
        ({"class_weights": [1.0, 2, 3, 4, -1]}, "must be 5 weights of at least 0"),
        ({"class_weights": [0.0] * 5}, "not all 0"),
        ({"class_weights": "balance"}, "one weight per class or 'balanced', but got 'balance'"),
        ({"class_weights": "balanced", "compute_loss_func": print}, "which compute_loss_func replaces"),
        ({"class_weights": "balanced", "balanced_sampling": True}, "both correct the sizes of the classes"),
        ({"balanced_sampling": True, "train_sampling_strategy": "sequential"}, "train_sampling_strategy='sequential'"),
    ],
)
def test_arguments_that_contradict(build, train, arguments, words):
    strategy = {name: arguments.pop(name) for name in ("train_sampling_strategy",) if name in arguments}
    with pytest.raises(ValueError, match=words):
        train(build(), "none", trainer_kwargs=arguments, **strategy)


@pytest.mark.parametrize("argument", [{"class_weights": "balanced"}, {"balanced_sampling": True}])
def test_a_stream_is_not_read_twice(build, train, argument):
    stream = SeededStream([], dict, bytes)
    with pytest.raises(ValueError, match="reads the labels of all training samples before training"):
        train(build(), "none", trainer_kwargs={"train_dataset": stream} | argument, max_steps=1)


def test_label_maps_have_no_class_to_sample_by(build_segmenter, train):
    with pytest.raises(ValueError, match="those for image-segmentation have several"):
        train(build_segmenter(), "none", trainer_kwargs={"balanced_sampling": True})


def test_a_method_that_takes_its_label_loss_elsewhere_is_named(build, train):
    with pytest.raises(
        ValueError, match="^class_weights has no effect on Unweighted, which does not take its label loss"
    ):
        train(build(), Unweighted(), trainer_kwargs={"class_weights": [1.0] * 5}, max_steps=1)
