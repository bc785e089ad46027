"""Multi-label classification end to end: training, evaluation, card, checkpoint and pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2
from transformers import AutoModelForImageClassification, pipeline

from hf_selfkd import EarlyExitPipeline, MultiExitAveragePrecision, calibrate, exit_costs
from hf_selfkd.evaluation import anytime_curve, budgeted_curve, collect_logits
from hf_selfkd.functional import binary_cross_entropy
from hf_selfkd.model_card import update_model_card
from tests.helpers.cards import sections_of, table_of

MULTI_LABEL = {"problem_type": "multi_label_classification"}


@pytest.fixture
def images():
    """Return twenty images, each with the labels that the bits of its index say, one of them unknown."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(20):
        labels = [index >> bit & 1 for bit in range(5)]
        brightness = torch.tensor(labels[:3]).view(3, 1, 1) * 2.0 - 1
        samples.append({"pixel_values": torch.randn(3, 32, 32, generator=generator) + brightness, "labels": labels})
    samples[4]["labels"][1] = -100
    return samples


@pytest.fixture
def batch(images):
    return {key: torch.stack([torch.as_tensor(image[key]) for image in images]) for key in images[0]}


@pytest.fixture
def trained(build, train, tmp_path):
    trainer = train(build(**MULTI_LABEL), trainer_kwargs={"card": {"dataset": "bits"}})
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    return trainer, metrics, tmp_path / "saved"


def test_metrics_of_every_exit_are_those_of_its_logits_and_on_the_card(trained, batch):
    trainer, metrics, folder = trained
    with torch.no_grad():
        output = trainer.network(**batch)
    expected = MultiExitAveragePrecision(keep_in_memory=True).compute(
        predictions=torch.stack(output.exit_logits, dim=1), references=batch["labels"]
    )
    found = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(binary_cross_entropy(output.logits, batch["labels"]).item(), rel=1e-5)
    predictions = trainer.predict(trainer.eval_dataset)
    assert predictions.metrics["test_f1"] == pytest.approx(metrics["eval_f1"])
    loss = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert sum(value for name, value in loss.items() if name.startswith("loss/")) == pytest.approx(loss["loss"])

    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "type: mean_average_precision" in card
    assert "top_k=5" in sections_of(card)["Use"]
    rows = table_of(card, "exit")
    for exit in range(4):
        assert (
            rows[exit]["mean average precision (%)"]
            == f"{100 * metrics[f'eval_exit_{exit}_mean_average_precision']:.2f}"
        )
        assert rows[exit]["exact-match accuracy (%)"] == f"{100 * metrics[f'eval_exit_{exit}_accuracy']:.2f}"
    assert rows[4]["F1 (%)"] == f"{100 * metrics['eval_ensemble_f1']:.2f}"


def test_from_the_checkpoint_to_early_exit(trained, batch):
    _, metrics, folder = trained
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    logits, labels = collect_logits(model, [batch])
    assert torch.equal(labels, batch["labels"])
    costs = exit_costs(model)
    rows = anytime_curve(logits, labels, costs)
    assert [row["accuracy"] for row in rows] == pytest.approx([metrics[f"eval_exit_{e}_accuracy"] for e in range(4)])
    policy = calibrate(logits, labels, costs, target_cost=0.9, criterion="min_confidence")
    (row,) = budgeted_curve(logits, labels, costs, logits, labels, targets=[0.9], criterion="min_confidence")
    assert row["accuracy"] == pytest.approx(policy.calibration["expected_accuracy"])
    model.config.exit_policy, model.config.early_exit = policy.to_dict(), True
    model.save_pretrained(folder)
    update_model_card(model, folder)
    assert "Expected exact-match accuracy: " in sections_of((folder / "README.md").read_text())["Early exit"]

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    classify = pipeline("image-classification", model=str(folder), pipeline_class=EarlyExitPipeline)
    pixels = classify.image_processor(images=image, return_tensors="pt")["pixel_values"]
    early = classify.model.early_exit(pixels)
    found = {prediction["label"]: prediction["score"] for prediction in classify(image)}
    scores = torch.tensor([found[f"LABEL_{label}"] for label in range(5)])
    assert_close(scores, early.logits[0].sigmoid(), atol=1e-5, rtol=1e-5)  # no softmax
    assert classify(image)[0]["exit_index"] == early.exit_index.item()


# Labels


def test_mixing_with_an_unknown_label_gives_an_unknown_one(build, train, monkeypatch):
    seen = []

    class Watched(v2.MixUp):
        def forward(self, *inputs):
            mixed = super().forward(*inputs)
            seen.append((inputs[1], mixed[1]))
            return mixed

    trainer = train(build(**MULTI_LABEL), trainer_kwargs={"mix": Watched(num_classes=5)})
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    for labels, mixed in seen:
        unknown = labels.isnan() | labels.roll(1, 0).isnan()
        assert torch.equal(mixed.isnan(), unknown)
        assert ((mixed >= 0) & (mixed <= 1))[~unknown].all()
    assert sum(mixed.isnan().sum().item() for _, mixed in seen) == 2  # in its own image and the one mixed with it


def test_label_smoothing_is_refused(build, train):
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 spreads one label over all classes, but multi"):
        train(build(**MULTI_LABEL), label_smoothing_factor=0.1)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda labels: torch.tensor(labels).bool()])
def test_labels_of_any_kind(build, train, images, kind):
    images = [
        image | {"labels": kind([0 if label == -100 else label for label in image["labels"]])} for image in images
    ]
    trainer = train(
        build(**MULTI_LABEL), trainer_kwargs={"train_dataset": images, "eval_dataset": images}, max_steps=1
    )
    loss = trainer.evaluate()["eval_loss"]
    other_name = [{"pixel_values": image["pixel_values"], "label": image["labels"]} for image in images]
    assert trainer.evaluate(other_name)["eval_loss"] == pytest.approx(loss) and loss > 0


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (3, r"Sample \d+ of the training data has the label 3, but .* a vector of 5 values, one for every class"),
        ([1, 3], r"has the label \[1, 3\], but problem_type is multi_label_classification"),
        ("cat", "has the label 'cat', but"),
        ([0, 1, 2, 0, 1], "has 2 in its label, but in a multi-label one a class has 1 or 0"),
        ([0, 1, -1, 0, 1], "has -1 in its label, .* or -100 where unknown"),
    ],
)
def test_labels_that_are_no_label_set_are_refused(build, train, images, label, words):
    images = [image | {"labels": label} for image in images]
    with pytest.raises(ValueError, match=words):
        train(build(**MULTI_LABEL), trainer_kwargs={"train_dataset": images})
