import copy
import json
import random
from pathlib import Path

import numpy as np
import psutil
import pytest
import timm
import torch
from hf_selfkd.training.averaging import WeightAverage
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils.data import IterableDataset
from torchvision.transforms import v2

from hf_selfkd import MultiExitForImageClassification, get_method
from hf_selfkd.functional import add, cross_entropy, smooth_labels
from hf_selfkd.training.seeded_data import SeededDataset
from tests.helpers.runs import Augmented, losses, same_weights

NORM_FREE = "test_vit"  # layer norm, in its exits too: no statistic depends on the micro-batch


class Scaffold(torch.nn.Linear):
    """A train-only module that takes part in the loss."""

    def forward(self, pixel_values, output):
        return {"logits": super().forward(output.exit_features[-1])}


@pytest.fixture
def scaffolded(monkeypatch):
    """BYOT with a scaffold: its term is logged as ``scaffold``."""
    method = get_method("byot")
    call = type(method).__call__
    monkeypatch.setattr(type(method), "scaffold", lambda self, model: Scaffold(96, 5))
    monkeypatch.setattr(
        type(method),
        "__call__",
        lambda self, output, labels, epoch: (
            call(self, output, labels, epoch) | {"scaffold": cross_entropy(output.scaffold["logits"], labels)}
        ),
    )
    return method


def test_the_logged_terms_add_up_to_the_logged_loss(build, train):
    trainer = train(build(), "byot", logging_steps=2, gradient_accumulation_steps=2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged
    for entry in logged:
        terms = {name: value for name, value in entry.items() if name.startswith("loss/")}
        assert set(terms) == {"loss/label", "loss/logit", "loss/hint"}
        assert sum(terms.values()) == pytest.approx(entry["loss"], rel=1e-5)


def test_the_first_loss_is_the_methods(build, batch, images, train):
    trainer = train(build(), "eed", per_device_train_batch_size=20)  # all images at once, in whatever order
    everything = {
        "pixel_values": torch.stack([image["pixel_values"] for image in images]),
        "labels": torch.tensor([image["labels"] for image in images]),
    }
    output = build().train()(everything["pixel_values"])
    terms = get_method("eed")(output, everything["labels"], 0.0)
    for name, term in terms.items():
        assert trainer.state.log_history[0][f"loss/{name}"] == pytest.approx(term.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["byot", "none"])
def test_gradient_accumulation_changes_nothing(build, train, method):
    whole = train(build(NORM_FREE), method, per_device_train_batch_size=10)
    parts = train(build(NORM_FREE), method, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


def test_evaluation_reports_every_exit_and_the_ensemble(build, batch, images, train):
    trainer = train(build(), per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    pixel_values = torch.stack([image["pixel_values"] for image in images])
    labels = torch.tensor([image["labels"] for image in images])
    with torch.no_grad():
        output = model(pixel_values)
    for index, logits in enumerate(output.exit_logits):
        assert metrics[f"eval_loss_exit_{index}"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        assert metrics[f"eval_accuracy_exit_{index}"] == pytest.approx(accuracy)
    assert "eval_loss_exit_4" not in metrics
    assert metrics["eval_loss"] == metrics["eval_loss_exit_3"]
    assert metrics["eval_accuracy"] == metrics["eval_accuracy_exit_3"]
    ensemble = (output.ensemble_logits.argmax(dim=1) == labels).float().mean().item()
    assert metrics["eval_accuracy_ensemble"] == pytest.approx(ensemble)


def test_evaluation_gathers_three_numbers_per_exit_and_image(build, images, train):
    trainer = train(build(), max_steps=1)
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {}
    trainer.evaluate()
    assert seen[0].shape == (20, 5, 3)


def test_evaluations_leave_no_file_open(build, train):
    trainer = train(build(), max_steps=1)
    trainer.evaluate()
    before = psutil.Process().num_fds()
    for _ in range(3):
        trainer.evaluate()
    assert psutil.Process().num_fds() == before


def test_whole_numbers_are_normalised(build, train):
    pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    model = build()
    model.config.pretrained_cfg |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).view(2, 3, 1, 1)
    ready = (pixels / 255 - mean) / std
    found = []
    for images in (pixels, ready):
        samples = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images)]
        trainer = train(copy.deepcopy(model), trainer_kwargs={"train_dataset": samples, "eval_dataset": samples})
        found.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    unknown = build()
    unknown.config.pretrained_cfg = None
    with pytest.raises(ValueError, match="is for images of 0 channels, but those of whole numbers have 3. Normalise"):
        train(unknown, trainer_kwargs={"train_dataset": [{"pixel_values": pixels[0], "labels": 0}] * 8})
    samples = [{"pixel_values": pixels[0, :1], "labels": 0}] * 8
    with pytest.raises(ValueError, match="is for images of 3 channels, but those of whole numbers have 1. Normalise"):
        train(model, trainer_kwargs={"train_dataset": samples})


def test_own_metrics_see_all_logits(build, images, train):
    seen = []
    trainer = train(
        build(), max_steps=1, trainer_kwargs={"compute_metrics": lambda p: seen.append(p.predictions) or {"mine": 1.0}}
    )
    assert trainer.evaluate()["eval_mine"] == 1.0
    logits, exit_logits = seen[0]
    assert logits.shape == (20, 5)
    assert [array.shape for array in exit_logits] == [(20, 5)] * 4


def test_predict_returns_what_own_preprocessing_makes_of_the_logits(build, images, train):
    options = {"preprocess_logits_for_metrics": lambda logits, labels: logits[0], "compute_metrics": lambda _: {}}
    prediction = train(build(), max_steps=1, trainer_kwargs=options).predict(images)
    assert prediction.predictions.shape == (20, 5)


def test_predict_returns_all_logits_and_the_metrics(build, images, train):
    trainer = train(build(), max_steps=1)
    prediction = trainer.predict(images)
    logits, exit_logits = prediction.predictions
    with torch.no_grad():
        output = trainer.model.eval()(torch.stack([image["pixel_values"] for image in images]))
    for found, expected in zip(exit_logits, output.exit_logits, strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert np.array_equal(logits, exit_logits[-1])
    evaluated = trainer.evaluate()
    for name in ("loss", "accuracy", "accuracy_exit_0", "accuracy_ensemble"):
        assert prediction.metrics[f"test_{name}"] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_not_stopping(build, images, scaffolded, tmp_path, train, workers):
    data = {"trainer_kwargs": {"train_dataset": Augmented(images)}, "dataloader_num_workers": workers}
    whole = train(build(), scaffolded, num_train_epochs=2, output_dir=str(tmp_path / "a"), **data)
    train(build(), scaffolded, num_train_epochs=2, save_strategy="steps", save_steps=3, **data)
    checkpoint = tmp_path / "run" / "checkpoint-3"  # in the middle of the first epoch
    assert set(load_file(checkpoint / "scaffold.safetensors")) == {"weight", "bias"}
    resumed = train(build(), scaffolded, num_train_epochs=2, resume=str(checkpoint), **data)
    assert losses(resumed) == losses(whole)
    assert same_weights(resumed.model, whole.model)


def test_the_number_of_workers_changes_nothing(build, images, train):
    data = {"trainer_kwargs": {"train_dataset": Augmented(images)}, "num_train_epochs": 2}
    alone = train(build(), **data)
    assert losses(train(build(), dataloader_num_workers=2, **data)) == losses(alone)
    persistent = train(build(), dataloader_num_workers=2, dataloader_persistent_workers=True, **data)
    assert losses(persistent) == losses(alone)


def test_augmentation_differs_between_epochs_and_images(images):
    dataset = SeededDataset(Augmented(images), seed=0, num_labels=5, name="training")
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


def test_resuming_with_another_method_is_refused(build, scaffolded, tmp_path, train):
    train(build(), scaffolded, save_strategy="steps", save_steps=3)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ValueError, match="written by method 'byot', but this run trains with 'eed'"):
        train(build(), "eed", resume=checkpoint)
    with pytest.raises(ValueError, match="no ema.safetensors: the run that wrote it had no ema_decay"):
        train(build(), scaffolded, resume=checkpoint, trainer_kwargs={"ema_decay": 0.9})
    Path(checkpoint, "scaffold.safetensors").unlink()
    Path(checkpoint, "files.json").unlink()
    with pytest.raises(ValueError, match="no scaffold.safetensors: the run that wrote it had no scaffold"):
        train(build(), scaffolded, resume=checkpoint)


def test_the_best_model_is_loaded_without_its_scaffold_and_with_its_average(build, scaffolded, train, caplog):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    train(build(), scaffolded, save_only_model=True, trainer_kwargs={"ema_decay": 0.9}, **options)
    assert "scaffold" not in caplog.text


class Stream(IterableDataset):
    """Images in their order, over and over."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        while True:
            yield from self.images


class SizedStream(Stream):
    """A stream that knows its length."""

    def __iter__(self):
        yield from self.images

    def __len__(self):
        return len(self.images)


def test_streams_train_and_evaluate(build, images, train):
    endless = train(build(), max_steps=2, trainer_kwargs={"train_dataset": Stream(images)})
    assert len(losses(endless)) == 2
    sized = {"train_dataset": SizedStream(images), "eval_dataset": SizedStream(images)}
    assert "eval_accuracy_exit_0" in train(build(), max_steps=2, trainer_kwargs=sized).evaluate()


def test_milestones_need_data_with_a_length(build, images, train):
    with pytest.raises(ValueError, match="lr_milestones are in epochs, but the training data has no length"):
        train(build(), max_steps=2, trainer_kwargs={"train_dataset": Stream(images), "lr_milestones": [1]})


def test_probability_labels_are_evaluated(build, images, train):
    soft = [image | {"labels": torch.eye(5)[image["labels"]] * 0.8 + 0.04} for image in images]
    hard = train(build(), "eed").evaluate()
    metrics = train(build(), "eed").evaluate(soft)
    assert metrics["eval_accuracy_exit_0"] == hard["eval_accuracy_exit_0"]
    assert metrics["eval_loss"] != hard["eval_loss"]


def test_what_cannot_be_trained_is_refused(build, images, train):
    frozen = build(exits=[])
    frozen.freeze_backbone()
    with pytest.raises(ValueError, match="No parameter is left to train"):
        train(frozen, "none")
    with pytest.raises(TypeError, match="method must be a name or a Method"):
        train(build(), type(get_method("byot")))
    with pytest.raises(ValueError, match="batch_eval_metrics needs your own compute_metrics"):
        train(build(), batch_eval_metrics=True)
    unlabelled = [{"pixel_values": image["pixel_values"]} for image in images]
    with pytest.raises(ValueError, match="must hold pixel_values and labels, but this one holds pixel_values"):
        train(build(), trainer_kwargs={"train_dataset": unlabelled})


def test_resuming_with_another_scaffold_is_refused(build, scaffolded, tmp_path, train, monkeypatch):
    train(build(), scaffolded, save_strategy="steps", save_steps=3)
    monkeypatch.setattr(type(scaffolded), "scaffold", lambda self, model: torch.nn.Sequential(Scaffold(96, 5)))
    with pytest.raises(ValueError, match="another method or another network: it differs in .*0.bias"):
        train(build(), scaffolded, resume=str(tmp_path / "run" / "checkpoint-3"))


def test_learning_rate_drops_at_milestones_in_epochs(build, train):
    trainer = train(
        build(), num_train_epochs=4, learning_rate=0.1, trainer_kwargs={"lr_milestones": [1, 3], "lr_gamma": 0.5}
    )
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.1] * 4 + [0.05] * 8 + [0.025] * 4)


def test_warm_up_goes_with_milestones(build, train):
    trainer = train(
        build(), num_train_epochs=2, learning_rate=0.1, warmup_steps=3, trainer_kwargs={"lr_milestones": [1]}
    )
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.01, 0.01, 0.01, 0.01])


def test_decay_leaves_out_what_timm_leaves_out(build, train):
    trainer = train(build("test_vit"), max_steps=1)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert "backbone.blocks.0.mlp.fc1.weight" in decayed
    assert "exits.0.mlp.0.weight" in decayed
    for name in ("pos_embed", "cls_token", "norm.weight", "blocks.0.mlp.fc1.bias"):
        assert f"backbone.{name}" in dict(trainer.model.named_parameters())
        assert f"backbone.{name}" not in decayed
    trainer.decay_norms = True
    assert set(trainer.get_decay_parameter_names(trainer.model)) == set(dict(trainer.model.named_parameters()))


def test_moving_average_of_the_weights(build, images, tmp_path, train):
    plain = train(build(), num_train_epochs=1, save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "a"))
    expected = {f"{key}": tensor.clone() for key, tensor in build().state_dict().items()}
    for step in range(1, 5):
        weights = load_file(tmp_path / "a" / f"checkpoint-{step}" / "model.safetensors")
        for name, tensor in weights.items():
            expected[name] = expected[name] * 0.7 + 0.3 * tensor if tensor.is_floating_point() else tensor
    averaged = train(
        build(), trainer_kwargs={"ema_decay": 0.7}, eval_strategy="steps", eval_steps=2, save_strategy="no"
    )
    assert losses(averaged) == losses(plain)
    for name, tensor in averaged.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)


def test_resuming_keeps_the_moving_average(build, tmp_path, train):
    options = {"trainer_kwargs": {"ema_decay": 0.7}, "num_train_epochs": 2}
    whole = train(build(), output_dir=str(tmp_path / "a"), **options)
    train(build(), save_strategy="steps", save_steps=3, **options)
    resumed = train(build(), resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("ema_decay", [None, 0.7])
def test_load_best_model_at_end(build, images, tmp_path, train, ema_decay):
    trainer = train(
        build(),
        num_train_epochs=3,
        learning_rate=0.5,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy_exit_0",
        trainer_kwargs={"ema_decay": ema_decay},
    )
    best = max(entry["eval_accuracy_exit_0"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_accuracy_exit_0"] == pytest.approx(best)


def test_average_out_of_range():
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), but got 1.0"):
        WeightAverage(1.0)


def test_hyperparameter_search_with_model_init(build, train, images):
    pytest.importorskip("optuna")
    trainer = train(None, "eed", max_steps=1, trainer_kwargs={"model_init": lambda: build()})
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.001, 0.1)},
        n_trials=2,
        direction="minimize",
        compute_objective=lambda metrics: metrics["eval_loss"],
        backend="optuna",
    )
    assert 0.001 <= best.hyperparameters["learning_rate"] <= 0.1


def test_label_smoothing_and_mixing_reach_every_label_term(build, batch, train, images):
    smoothed = train(build(), "deep_supervision", max_steps=1, label_smoothing_factor=0.1)
    plain = train(build(), "deep_supervision", max_steps=1)
    assert losses(smoothed)[0] != losses(plain)[0]
    labels = smooth_labels(batch["labels"], 5, 0.1)
    output = build().train()(batch["pixel_values"])
    expected = sum(
        torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
        for logits in output.exit_logits
    )
    found = add(get_method("deep_supervision")(output, labels, 0.0).values())
    torch.testing.assert_close(found, expected)
    seen = []

    def mix(pixel_values, labels):
        seen.append(tuple(labels.shape))
        return v2.MixUp(num_classes=5)(pixel_values, labels)

    mixed = train(build(), "byot", trainer_kwargs={"mix": mix}, label_smoothing_factor=0.1)
    assert seen == [(5,)] * 4
    assert all(np.isfinite(losses(mixed)))


def test_maps_are_not_copied_for_a_method_that_reads_none(build, batch, train):
    """Accelerate copies whatever the model returns to float32."""
    returned = []
    for method in ("byot", "frskd", "okd_mde"):
        model = build()
        trainer = train(model, method, bf16=True)
        _, output = trainer.compute_loss(trainer.model_wrapped, batch, return_outputs=True)
        returned.append((output.exit_maps, output.stage_outputs))
    assert returned == 3 * [(None, None)]


@pytest.mark.parametrize("name", ["frskd", "kd"])
def test_compiled_training_is_the_same_and_compiles_once(build, train, name):
    teacher = {"teacher": timm.create_model("test_resnet", num_classes=5)} if name == "kd" else {}
    torch._dynamo.reset()
    counters.clear()
    compiled = train(build(), get_method(name, **teacher), torch_compile=True, torch_compile_backend="eager")
    assert counters["stats"]["unique_graphs"] == 1
    assert losses(compiled) == pytest.approx(losses(train(build(), get_method(name, **teacher))), rel=1e-4)


def test_bf16_training(build, train):
    trainer = train(build(), "byot", bf16=True)
    assert all(np.isfinite(losses(trainer)))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_a_saved_model_has_no_scaffold(build, images, scaffolded, tmp_path, train):
    trainer = train(build(), scaffolded)
    trainer.save_model(tmp_path / "final")
    assert not [name for name in load_file(tmp_path / "final" / "model.safetensors") if "scaffold" in name]
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path / "final")
    del trainer.model.scaffold
    assert same_weights(loaded, trainer.model)


def test_prepare_is_called_once_in_a_fresh_run(build, tmp_path, train, monkeypatch):
    calls = []

    def prepare(self, model, batches):
        calls.append((model.training, torch.is_grad_enabled(), sum(len(batch["labels"]) for batch in batches)))

    monkeypatch.setattr(type(get_method("byot")), "prepare", prepare)
    train(build(), save_strategy="steps", save_steps=3)
    assert calls == [(False, False, 20)]
    train(build(), resume=str(tmp_path / "run" / "checkpoint-3"))
    assert len(calls) == 1


def test_a_frozen_backbone_keeps_the_models_answers(build, batch, train):
    model = build()
    model.freeze_backbone()
    before = model.eval()(batch["pixel_values"])
    trainer = train(model, "deep_supervision")
    after = trainer.model.eval()(batch["pixel_values"])
    assert torch.equal(after.logits, before.logits)
    assert not torch.equal(after.exit_logits[0], before.exit_logits[0])


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_a_label_outside_the_classes_is_named(build, images, train, kind):
    images[7]["labels"] = kind(5)
    with pytest.raises(ValueError, match=r"Sample 7 of the training data has label 5, but the model has 5 classes"):
        train(build())


def test_a_sample_that_cannot_be_read_is_named(build, images, train):
    class Broken(Augmented):
        def __getitem__(self, index):
            if index == 11:
                raise OSError("cannot identify image file 'cat.jpg'")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="Sample 11 of the training data cannot be read: .*cat.jpg"):
        train(build(), trainer_kwargs={"train_dataset": Broken(images)})


def test_a_plain_model_is_refused(train):
    with pytest.raises(ValueError, match="needs a multi-exit model, but got Linear. Build one with"):
        train(torch.nn.Linear(1, 1))


def test_a_method_that_needs_exits_refuses_a_model_without(build, train):
    with pytest.raises(ValueError, match="BYOT needs at least 2 exits"):
        train(build(exits=[]), "byot")


def test_the_state_of_the_run_holds_all_terms(build, tmp_path, train):
    train(build(), save_strategy="steps", save_steps=4)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert "loss/hint" in state["log_history"][0]
