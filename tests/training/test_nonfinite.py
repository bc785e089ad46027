"""Numbers that are not finite stop a run before the weights change, or skip the step where that is allowed."""

import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_selfkd import SelfDistillationTrainer, get_method
from hf_selfkd.training.nonfinite import _local_grad_norm
from hf_selfkd.training.settings import swapped
from tests.helpers.runs import losses, same_weights
from tests.helpers.versions import needs_train_loss_of_the_call

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def poisoned(images):
    """Return the images, of which number 7 has one bad pixel."""

    def poisoned(value=NAN):
        bad = images[7]["pixel_values"].clone()
        bad[1, 2, 3] = value
        return [*images[:7], images[7] | {"pixel_values": bad}, *images[8:]]

    return poisoned


def step_with(trainer, index):
    """Return in which step of the first epoch a sample came, from 1."""
    with swapped(trainer, is_in_train=True):  # otherwise batches have no indices
        loader = trainer.get_train_dataloader()
    return 1 + next(step for step, batch in enumerate(loader) if index in batch["sample_indices"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_run_stops_before_the_weights_change_and_names_everything(build, train, poisoned, tmp_path, accumulation):
    model = build()
    saving = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 5 // accumulation}
    options = saving | {"gradient_accumulation_steps": accumulation, "num_train_epochs": 3}
    with pytest.raises(FloatingPointError) as error:
        train(model, trainer_kwargs={"train_dataset": poisoned()}, **options)
    words = str(error.value)
    assert words.startswith("loss/label is nan, loss/logit is nan, loss/hint is nan, loss is nan for the samples ")
    assert "7" in words.split("samples ")[1].split(";")[0].split(", ")
    assert len(words.split("samples ")[1].split(";")[0].split(", ")) == 5 // accumulation
    step = int(words.split("at step ")[1].split()[0])
    assert f"those after step {step - 1}" in words
    assert "with a learning rate of 0.0" in words
    assert "(0 skipped)" in words
    if step > 1:
        kept = load_file(tmp_path / "run" / f"checkpoint-{step - 1}" / "model.safetensors")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, kept[name]), name
    assert not (tmp_path / "run" / f"checkpoint-{step}").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_too(build, train, monkeypatch):
    method = get_method("byot")
    call = type(method).__call__
    monkeypatch.setattr(  # the loss is 0, its derivative infinite times 0
        type(method),
        "__call__",
        lambda self, output, labels, epoch: (
            call(self, output, labels, epoch) | {"root": (0 * output.logits).sum().sqrt()}
        ),
    )
    with pytest.raises(FloatingPointError, match=r"^grad_norm is nan for the samples (\d+, ){4}\d+; at step 1 with a"):
        train(build(), method)


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
def test_a_norm_that_overflows_is_not_clipped_to_nothing(build, train, monkeypatch, max_grad_norm):
    method = get_method("byot")
    monkeypatch.setattr(
        type(method), "__call__", lambda self, output, labels, epoch: {"huge": 1e25 * output.logits.mean()}
    )
    model = build()
    with pytest.raises(FloatingPointError, match="^grad_norm is inf for the samples"):
        train(model, method, max_grad_norm=max_grad_norm)
    for (name, found), (_, before) in zip(model.named_parameters(), build().named_parameters(), strict=True):
        assert torch.equal(found, before), name


def test_an_overflow_of_the_sum_is_named(build, train, monkeypatch):
    method = get_method("byot")
    huge = {name: torch.tensor(3e38, requires_grad=True) for name in ("a", "b")}
    monkeypatch.setattr(type(method), "__call__", lambda *_: {name: 1.0 * term for name, term in huge.items()})
    with pytest.raises(FloatingPointError, match="^loss is inf for the samples"):
        train(build(), method)


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_a_batch_that_is_skipped_changes_nothing(build, train, poisoned, tmp_path, value, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_selfkd"):
        trainer = train(
            build(),
            "eed",
            save_strategy="steps",
            save_steps=1,
            logging_steps=4,
            optim_args="momentum=0.9",
            trainer_kwargs={"train_dataset": poisoned(value), "max_skipped_batches": 2},
        )
    step = step_with(trainer, 7)
    before, after = (tmp_path / "run" / f"checkpoint-{number}" for number in (step - 1, step))
    start = {name: tensor for name, tensor in build().state_dict().items() if "scaffold" not in name}
    before = load_file(before / "model.safetensors") if step > 1 else start
    for name, tensor in load_file(after / "model.safetensors").items():
        assert torch.equal(tensor, before[name]), name
    assert [entry["skipped_batches"] for entry in trainer.state.log_history if "skipped_batches" in entry] == [1]
    assert "Skipped: loss/" in caplog.text
    assert "1 of 2 batches." in caplog.text
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_means_are_over_the_steps_that_were_taken(build, train, poisoned, tmp_path):
    data = {"train_dataset": poisoned(), "max_skipped_batches": 1}
    every = train(build(), trainer_kwargs=data, logging_steps=1, output_dir=str(tmp_path / "a"))
    once = train(build(), trainer_kwargs=data, logging_steps=4)
    assert len(losses(every)) == 3
    entry = next(entry for entry in once.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(sum(losses(every)) / 3, rel=1e-6)
    assert sum(value for name, value in entry.items() if name.startswith("loss/")) == pytest.approx(
        entry["loss"], rel=1e-5
    )
    assert math.isfinite(entry["grad_norm"])


@needs_train_loss_of_the_call
def test_train_loss_is_over_the_steps_that_were_taken(build, train, poisoned):
    data = {"train_dataset": poisoned(), "max_skipped_batches": 1}
    trainer = train(build(), trainer_kwargs=data, logging_steps=4)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(losses(trainer)[0], rel=1e-6)


def test_the_guard_changes_nothing_where_all_is_finite(build, train, tmp_path):
    plain = train(build(), output_dir=str(tmp_path / "a"))
    allowed = train(build(), trainer_kwargs={"max_skipped_batches": 3})
    assert same_weights(plain.model, allowed.model)
    assert losses(plain) == losses(allowed)


@pytest.mark.parametrize("number", [-1, 1.5, True, "2"])
def test_invalid_numbers_of_batches(build, train, number):
    with pytest.raises(ValueError, match="max_skipped_batches must be an integer of at least 0, but got"):
        train(build(), trainer_kwargs={"max_skipped_batches": number})


def test_fp16_skips_batches_itself(build, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args.fp16 = True  # which a CPU does not have
    with pytest.raises(ValueError, match="fp16 skips such batches itself"):
        SelfDistillationTrainer(build(), args, max_skipped_batches=1)


def test_a_resumed_run_continues_to_count(build, train, poisoned, tmp_path):
    options = {"num_train_epochs": 2, "trainer_kwargs": {"train_dataset": poisoned(), "max_skipped_batches": 1}}
    with pytest.raises(FloatingPointError, match=r"for the samples .*\b7\b.* \(1 skipped\)"):
        train(build(), save_strategy="epoch", **options)
    with pytest.raises(FloatingPointError, match=r"\(1 skipped\)"):
        train(build(), resume=str(tmp_path / "run" / "checkpoint-4"), **options)


def test_the_norm_is_that_of_the_gradients(build, batch):
    model = build().train()
    model(batch["pixel_values"]).logits.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert _local_grad_norm(model) == pytest.approx(sum(float(g.double().square().sum()) for g in gradients) ** 0.5)
    gradients[3].flatten()[0] = NAN
    assert _local_grad_norm(model).isnan()
