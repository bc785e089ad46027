"""The trainer: its losses, metrics and data, and training from the beginning to the end."""

import copy

import numpy as np
import psutil
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils.data import IterableDataset, default_collate
from transformers.trainer_pt_utils import EvalLoopContainer

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, get_method
from hf_selfkd.functional import add, cross_entropy
from tests.helpers.runs import Augmented, losses, same_weights

NORM_FREE = "test_vit"  # layer norm, in its exits too: no statistic depends on the micro-batch


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
    complete = train(build(NORM_FREE), method, per_device_train_batch_size=10)
    parts = train(build(NORM_FREE), method, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    assert losses(parts) == pytest.approx(losses(complete), rel=1e-5)
    found, expected = dict(parts.model.state_dict()), dict(complete.model.state_dict())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_evaluation_reports_every_exit_and_the_ensemble(build, batch, images, train):
    trainer = train(build(), per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    pixel_values = torch.stack([image["pixel_values"] for image in images])
    labels = torch.tensor([image["labels"] for image in images])
    with torch.no_grad():
        output = model(pixel_values)
    for index, logits in enumerate(output.exit_logits):
        assert metrics[f"eval_exit_{index}_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        assert metrics[f"eval_exit_{index}_accuracy"] == pytest.approx(accuracy)
    assert "eval_exit_4_loss" not in metrics
    assert metrics["eval_loss"] == metrics["eval_exit_3_loss"]
    assert metrics["eval_accuracy"] == metrics["eval_exit_3_accuracy"]
    ensemble = (output.ensemble_logits.argmax(dim=1) == labels).float().mean().item()
    assert metrics["eval_ensemble_accuracy"] == pytest.approx(ensemble)


@pytest.mark.parametrize("steps", [None, 1])
def test_evaluation_gathers_three_numbers_per_exit_and_image(build, images, train, monkeypatch, steps):
    gathered = []
    add = EvalLoopContainer.add
    monkeypatch.setattr(EvalLoopContainer, "add", lambda self, tensors: gathered.append(tensors) or add(self, tensors))
    trainer = train(build(), max_steps=1, per_device_eval_batch_size=20, eval_accumulation_steps=steps)
    trainer.evaluate()
    (predictions, is_labelled), loss = gathered
    assert (predictions.shape, is_labelled.shape, loss.shape) == ((20, 5, 3), (20,), (20,))


def test_evaluations_leave_no_file_open(build, train):
    trainer = train(build(), max_steps=1)
    trainer.evaluate()
    before = psutil.Process().num_fds()
    for _ in range(3):
        trainer.evaluate()
    assert psutil.Process().num_fds() == before


def published_metrics(prediction):
    """Return the metrics of the recipe that is published most."""
    return {"mine": (np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean()}


@pytest.mark.parametrize("concat", [True, False])
def test_own_metrics_come_on_top_of_those_of_the_exits(build, images, train, concat):
    seen = []
    metrics = published_metrics if concat else lambda p: seen.append(p.predictions) or {"accuracy": 2.0}
    options = {"trainer_kwargs": {"compute_metrics": metrics}, "eval_do_concat_batches": concat}
    found = train(build(), max_steps=1, per_device_eval_batch_size=8, **options).evaluate()
    plain = train(build(), max_steps=1).evaluate()
    assert found["eval_exit_3_accuracy"] == plain["eval_accuracy"]
    if concat:
        assert found["eval_mine"] == pytest.approx(found["eval_accuracy"])
    else:
        assert [batch.shape for batch in seen[0]] == [(8, 5), (8, 5), (4, 5)]
        assert found["eval_accuracy"] == 2.0  # of two with one name one's own


@pytest.mark.parametrize("own", [{}, {"batch_eval_metrics": True}])
def test_batches_may_stay_apart_without_own_metrics(build, train, own):
    plain = train(build(), max_steps=1).evaluate()
    apart = train(build(), max_steps=1, eval_do_concat_batches=False, **own).evaluate()
    assert apart["eval_exit_0_calibration_error"] == plain["eval_exit_0_calibration_error"]


def test_preprocessing_sees_the_logits_of_the_final_exit(build, images, train):
    options = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(dim=-1)}
    trainer = train(build(), max_steps=1, trainer_kwargs=options)
    prediction = trainer.predict(images)
    assert prediction.predictions.shape == (20,)
    accuracy = (prediction.predictions == prediction.label_ids).mean()
    assert accuracy == pytest.approx(prediction.metrics["test_accuracy"])
    assert trainer.evaluate()["eval_accuracy"] == prediction.metrics["test_accuracy"]


def test_predict_returns_the_logits_and_the_metrics(build, images, train):
    trainer = train(build(), max_steps=1)
    prediction = trainer.predict(images)
    with torch.no_grad():
        output = trainer.model.eval()(torch.stack([image["pixel_values"] for image in images]))
    np.testing.assert_allclose(prediction.predictions, output.logits.numpy(), rtol=1e-4, atol=1e-5)
    trainer.predict_all_exits = True
    for found, expected in zip(trainer.predict(images).predictions, output.exit_logits, strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    evaluated = trainer.evaluate()
    for name in ("loss", "accuracy", "exit_0_accuracy", "ensemble_accuracy"):
        assert prediction.metrics[f"test_{name}"] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-5)


def test_images_without_labels_are_predicted_by_all_exits(build, images, train):
    trainer = train(build(), max_steps=1, trainer_kwargs={"predict_all_exits": True})
    expected = trainer.predict(images).predictions
    config = trainer.model.config
    config.exit_policy, config.early_exit = ExitPolicy(thresholds=[0.0] * 3).to_dict(), True
    prediction = trainer.predict([{"pixel_values": image["pixel_values"]} for image in images])
    assert len(prediction.predictions) == 4
    assert all(map(np.array_equal, prediction.predictions, expected))
    assert not [name for name in prediction.metrics if "accuracy" in name]
    assert config.early_exit


def test_a_batch_of_the_loaders_is_an_input_of_the_model(build, train):
    trainer = train(build(), max_steps=1)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert trainer.model(**next(iter(loader))).loss > 0


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(build, images, train):
    data = {"trainer_kwargs": {"train_dataset": Augmented(images)}, "num_train_epochs": 2}
    alone = train(build(), **data)
    assert losses(train(build(), dataloader_num_workers=2, **data)) == losses(alone)
    persistent = train(build(), dataloader_num_workers=2, dataloader_persistent_workers=True, **data)
    assert losses(persistent) == losses(alone)


class Stream(IterableDataset):
    """Images in their order: over and over, or once, and then with a length."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        while True:
            yield from self.images


class SizedStream(Stream):
    def __iter__(self):
        yield from self.images

    def __len__(self):
        return len(self.images)


def test_other_streams_train_and_evaluate(build, images, train):
    endless = train(build(), max_steps=2, trainer_kwargs={"train_dataset": Stream(images)})
    assert len(losses(endless)) == 2
    with pytest.raises(ValueError, match="lr_milestones are in epochs, but the training data has no length"):
        train(build(), max_steps=2, trainer_kwargs={"train_dataset": Stream(images), "lr_milestones": [1]})
    sized = {"train_dataset": SizedStream(images), "eval_dataset": SizedStream(images)}
    assert "eval_exit_0_accuracy" in train(build(), max_steps=2, trainer_kwargs=sized).evaluate()


@pytest.mark.parametrize("persistent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_data_sets_with_names_are_evaluated_each(build, images, train, persistent):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True} if persistent else {}
    parts = {"first": images[:5], "all": images}
    trainer = train(build(), max_steps=1, trainer_kwargs={"eval_dataset": parts}, **workers)
    metrics = trainer.evaluate()
    for name, part in parts.items():
        expected = train(build(), max_steps=1, trainer_kwargs={"eval_dataset": part}).evaluate()
        assert metrics[f"eval_{name}_loss"] == expected["eval_loss"]
    again = trainer.evaluate()  # from the same loaders
    assert [again[f"eval_{name}_loss"] for name in parts] == [metrics[f"eval_{name}_loss"] for name in parts]


def test_a_batch_without_labels_is_refused(build, images, train):
    unlabelled = [{"pixel_values": image["pixel_values"]} for image in images]
    with pytest.raises(ValueError, match="needs pixel_values and labels, but has pixel_values"):
        train(build(), trainer_kwargs={"train_dataset": unlabelled})


@pytest.mark.parametrize("name", ["frskd", "lsh"])
def test_an_own_loop_has_the_losses_of_the_trainer(build, images, train, name):
    options = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    trainer = train(build(), name, **options)
    model, method = build(), get_method(name)
    batches = [default_collate(images[start : start + 5]) for start in range(0, 20, 5)]
    torch.manual_seed(0)
    method.attach(model)
    with torch.no_grad():
        method.prepare(model.eval(), batches)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    found = []
    for step, batch in enumerate(batches):
        output = model.train()(batch["pixel_values"])
        loss = add(method.terms(output, batch["labels"], epoch=step / 4).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found == losses(trainer)
    method.detach(model)
    assert same_weights(model, trainer.model)
    assert (model.scaffold, model.detach_exits) == (None, False)


@pytest.mark.slow
def test_a_model_that_is_compiled_already_trains_and_resumes(build, train, tmp_path):
    def compiled():
        return torch.compile(build(small_input_stem=False), backend="eager")

    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "trainer_kwargs": {"ema_decay": 0.5}}
    data = {"trainer_kwargs": options["trainer_kwargs"], "output_dir": str(tmp_path / "plain"), "max_steps": 3}
    plain = train(build(small_input_stem=False), "lsh", **data)
    trainer = train(compiled(), "lsh", **options)
    assert trainer.network is not trainer.model
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    resumed = train(compiled(), "lsh", resume=str(tmp_path / "run" / "checkpoint-2"), **options)
    assert losses(resumed) == losses(trainer)
    assert same_weights(resumed.network, trainer.network)


class Wrapper(torch.nn.Module):
    """A module around a model, whose forward names no arguments, as that of PEFT and of a compiled model."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_wrapped_model_is_evaluated_as_the_one_inside(build, train):
    wrapped = train(Wrapper(build()), max_steps=1, remove_unused_columns=False).evaluate()
    plain = train(build(), max_steps=1).evaluate()
    assert wrapped["eval_exit_0_accuracy"] == plain["eval_exit_0_accuracy"]
    assert wrapped["eval_loss"] == plain["eval_loss"]


def test_a_saved_model_has_no_scaffold(build, tmp_path, train):
    trainer = train(build(), "frskd", max_steps=1)
    trainer.save_model(tmp_path / "final")
    assert not [name for name in load_file(tmp_path / "final" / "model.safetensors") if "scaffold" in name]
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path / "final")
    assert same_weights(loaded, trainer.model)


def test_probability_labels_are_evaluated(build, images, train):
    soft = [image | {"labels": torch.eye(5)[image["labels"]] * 0.8 + 0.04} for image in images]
    hard = train(build(), "eed").evaluate()
    metrics = train(build(), "eed").evaluate(soft)
    assert metrics["eval_exit_0_accuracy"] == hard["eval_exit_0_accuracy"]
    assert metrics["eval_loss"] != hard["eval_loss"]


@pytest.mark.slow
def test_feature_maps_are_not_copied_for_a_method_that_reads_none(build, batch, train):
    """Accelerate copies whatever the model returns to float32."""
    returned = []
    for method in ("byot", "frskd", "okd_mde"):
        trainer = train(build(small_input_stem=False), method, bf16=True, max_steps=1)
        with trainer.attachment.on_the_model():
            _, output = trainer.compute_loss(trainer.model_wrapped, batch, return_outputs=True)
        returned.append((output.exit_maps, output.stage_outputs))
    assert returned == 3 * [(None, None)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frskd", "kd"])
def test_compiled_training_is_the_same_and_compiles_once(build, train, name):
    teacher = {"teacher": timm.create_model("test_resnet", num_classes=5)} if name == "kd" else {}
    torch._dynamo.reset()
    counters.clear()
    model, compiled = build(small_input_stem=False), {"torch_compile": True, "torch_compile_backend": "eager"}
    expected = losses(train(copy.deepcopy(model), get_method(name, **teacher)))
    found = losses(train(model, get_method(name, **teacher), **compiled))
    assert counters["stats"]["unique_graphs"] == 1
    assert found == pytest.approx(expected, rel=1e-4)


def test_bf16_training(build, train):
    trainer = train(build(small_input_stem=False), "byot", bf16=True)
    assert all(np.isfinite(losses(trainer)))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_a_frozen_backbone_keeps_the_logits_of_the_model(build, batch, train):
    model = build()
    model.freeze_backbone()
    before = model.eval()(batch["pixel_values"])
    trainer = train(model, "deep_supervision")
    after = trainer.model.eval()(batch["pixel_values"])
    assert torch.equal(after.logits, before.logits)
    assert not torch.equal(after.exit_logits[0], before.exit_logits[0])
