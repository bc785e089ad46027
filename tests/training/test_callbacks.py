"""The callbacks, without training where that is possible."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_selfkd import ExitPolicy, get_method
from hf_selfkd.model_card.evaluations import Evaluation
from hf_selfkd.training.callbacks import CardRecorder, EmaWeights, SaveAfterEpoch, SeedData, ends_epoch
from hf_selfkd.training.seeded_data import SeededDataset
from tests.helpers.runs import check_of, losses, same_weights


def at_step(**state):
    return TrainerState(**{"epoch": 0.5, "global_step": 2, "max_steps": 8} | state)


# The scaffold


def test_prepare_is_called_once_in_a_fresh_run(build, tmp_path, train, monkeypatch):
    calls = []

    def prepare(self, model, batches):
        calls.append((model.training, torch.is_grad_enabled(), sum(len(batch["labels"]) for batch in batches)))

    monkeypatch.setattr(type(get_method("byot")), "prepare", prepare)
    train(build(), save_strategy="steps", save_steps=3, max_steps=3)
    assert calls == [(False, False, 20)]
    train(build(), resume=str(tmp_path / "run" / "checkpoint-3"))
    assert len(calls) == 1


# The data


def test_the_data_follows_the_epoch(images):
    callback, args = SeedData(), TrainingArguments(use_cpu=True)
    data = SeededDataset(images, 0, check_of(5, "training"))
    data.share_epoch()
    callback.follow(data)
    callback.on_epoch_begin(args, at_step(epoch=3.0), TrainerControl())
    assert data.epoch == 3
    callback.follow(iter(images))  # data without an epoch
    callback.on_epoch_begin(args, at_step(epoch=4.0), TrainerControl())
    assert data.epoch == 3


# Saving


def test_ends_of_epochs():
    assert ends_epoch(at_step(epoch=2.0))
    assert ends_epoch(at_step(epoch=0.9, global_step=8))
    assert not ends_epoch(at_step())


@pytest.mark.parametrize(("epoch", "at_once", "later"), [(0.5, True, False), (1.0, False, True)])
def test_the_last_step_of_an_epoch_is_saved_after_it(epoch, at_once, later):
    callback, args, control = SaveAfterEpoch(), TrainingArguments(use_cpu=True), TrainerControl(should_save=True)
    callback.on_step_end(args, at_step(epoch=epoch), control)
    assert control.should_save is at_once
    control.should_save = False
    callback.on_epoch_end(args, at_step(epoch=epoch), control)
    assert control.should_save is later


# The average


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\)"):
        EmaWeights(decay)


def test_the_average_follows_the_inference_weights(build):
    model, average = build(), EmaWeights(0.75)
    get_method("frskd").attach(model)
    average.on_train_begin(None, None, None, model)
    assert not [name for name in average.state_dict() if "scaffold" in name]
    weight = model.exits[0].classifier.weight
    start = weight.detach().clone()
    weight.data += 4
    average.on_step_end(None, None, None, model)
    torch.testing.assert_close(average.state_dict()["exits.0.classifier.weight"], start + 1)
    with average.applied_to(model):
        torch.testing.assert_close(weight.detach(), start + 1)
    torch.testing.assert_close(weight.detach(), start + 4)
    average.on_train_end(TrainingArguments(use_cpu=True), at_step(), None, model)
    torch.testing.assert_close(weight.detach(), start + 1)


def test_the_average_is_inside_what_wraps_the_model(build):
    model, average = build(), EmaWeights(0.5)
    wrapper = torch.nn.ModuleDict({"inner": model})
    average.on_train_begin(None, None, None, wrapper)
    assert average.state_dict().keys() == model.state_dict().keys()
    with average.applied_to(wrapper):
        pass


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
    uninterrupted = train(build(), output_dir=str(tmp_path / "a"), **options)
    train(build(), save_strategy="steps", save_steps=3, **options)
    resumed = train(build(), resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert same_weights(resumed.model, uninterrupted.model)


@pytest.mark.parametrize("ema_decay", [None, 0.7])
def test_load_best_model_at_end(build, train, caplog, ema_decay):
    trainer = train(
        build(small_input_stem=False),
        "frskd",
        num_train_epochs=3,
        learning_rate=0.5,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="exit_0_accuracy",
        trainer_kwargs={"ema_decay": ema_decay},
    )
    best = max(entry["eval_exit_0_accuracy"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.card_recorder.evaluations["eval"].metrics["eval_exit_0_accuracy"] == best
    assert trainer.evaluate()["eval_exit_0_accuracy"] == pytest.approx(best)
    assert "missing keys" not in caplog.text  # of the scaffold, which is in another file


# Records for the card


def test_an_evaluation_is_stale_after_a_step(build):
    recorder, args, model = CardRecorder(), TrainingArguments(use_cpu=True), build()
    model.config.exit_policy = ExitPolicy(thresholds=[0.5] * 3).to_dict()
    found = Evaluation(0, 20, {"eval_loss": 1.0})
    assert recorder.evaluations == {}
    recorder.record("test", found)  # without a loss under this prefix: nothing was labelled
    assert recorder.evaluations == {}
    recorder.record("eval", found)
    assert recorder.evaluations == {"eval": found}
    recorder.on_train_begin(args, at_step(), TrainerControl(), model)
    assert recorder.evaluations == {}
    assert recorder.policy_before_training == model.config.exit_policy
    recorder.record("eval", found)
    recorder.on_step_end(args, at_step(), TrainerControl())
    assert recorder.evaluations == {}
    other = Evaluation(0, 20, {"test_loss": 1.0})
    recorder.record("test", other)
    assert recorder.evaluations == {"test": other}  # the other one is of earlier weights


def test_the_evaluation_of_the_best_checkpoint_is_recorded():
    recorder, args = CardRecorder(), TrainingArguments(use_cpu=True)
    args.load_best_model_at_end = True
    log = [{"step": 2, "eval_loss": 1.0, "loss": 3.0}, {"step": 2, "eval_b_loss": 5.0}, {"step": 4, "eval_loss": 2.0}]
    state = at_step(log_history=log, best_global_step=2, best_model_checkpoint="run/checkpoint-2", global_step=5)
    recorder.on_train_end(args, state, TrainerControl())
    assert recorder.evaluations == {}  # nothing was evaluated in this run
    recorder.record("eval", Evaluation(2, 20, {"eval_loss": 1.0}, "of step 2"))
    recorder.on_step_end(args, state, TrainerControl())
    recorder.record("eval", Evaluation(4, 20, {"eval_loss": 2.0}, "of step 4"))
    recorder.record("eval_b", Evaluation(4, 30, {"eval_b_loss": 6.0}))
    recorder.on_step_end(args, state, TrainerControl())
    recorder.on_train_end(args, state, TrainerControl())
    assert recorder.evaluations == {
        "eval": Evaluation(5, 20, {"eval_loss": 1.0}, "of step 2"),
        "eval_b": Evaluation(5, 30, {"eval_b_loss": 5.0}),
    }


def test_the_trainer_records_its_evaluations(build, images, train):
    trainer = train(build(), max_steps=2, eval_strategy="steps", eval_steps=2)
    assert trainer.card_recorder.evaluations["eval"].step == 2
    trainer.predict(images[:7])
    evaluation = trainer.card_recorder.evaluations["eval"]
    assert (evaluation.num_images, math.isfinite(evaluation.metrics["eval_loss"])) == (20, True)
    trainer.evaluate(images[:7])
    assert trainer.card_recorder.evaluations["eval"].num_images == 7
