"""Checkpoints are whole or absent, and a run that goes on from one is the run that never stopped."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_selfkd.training.checkpoints import check_complete, find_last_checkpoint
from tests.helpers.runs import Augmented, same_weights

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


class Once(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def logged(trainer):
    """Return the log without times and without the mean over the steps of one call."""
    left_out = ("runtime", "per_second", "train_loss", "total_flos")
    log = trainer.state.log_history
    log = [{key: value for key, value in entry.items() if not key.endswith(left_out)} for entry in log]
    return [entry for entry in log if entry.keys() - {"epoch", "step"}]


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def terminated(build, train, images):
    """Train until SIGTERM comes in a step, and return what is needed to go on."""

    def terminated(step, callbacks=(), **args):
        data = {"train_dataset": Augmented(images), "ema_decay": 0.7}
        with pytest.raises(SystemExit) as end:
            train(build(), trainer_kwargs=data | {"callbacks": [Once(step - 1, sigterm), *callbacks]}, **args)
        assert end.value.code == 143
        return {"trainer_kwargs": data, **args}

    return terminated


# 3 is in the middle of an epoch of 4 steps and of a log entry of 2; 4 is the end of an epoch, with its evaluation.
@pytest.mark.parametrize("step", [3, 4])
def test_sigterm_saves_first_and_the_run_goes_on_as_if_it_had_not_come(build, train, tmp_path, terminated, step):
    options = {"num_train_epochs": 3, "logging_steps": 3, "eval_strategy": "epoch", "save_strategy": "epoch"}
    handler = signal.getsignal(signal.SIGTERM)
    options = terminated(step, **options)
    assert signal.getsignal(signal.SIGTERM) is handler
    checkpoint = get_last_checkpoint(tmp_path / "run")
    assert checkpoint.endswith(f"checkpoint-{step}")
    resumed = train(build(), resume=checkpoint, **options)
    whole = train(build(), output_dir=str(tmp_path / "whole"), **options)
    assert same_weights(resumed.model, whole.model)
    assert logged(resumed) == logged(whole)
    assert len([entry for entry in logged(whole) if "eval_loss" in entry]) == 3
    assert not (tmp_path / "run" / "_incomplete").exists()


def test_sigterm_at_the_end_of_an_epoch_saves_before_and_after_its_evaluation(terminated, tmp_path):
    class Evaluated(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            assert get_last_checkpoint(tmp_path / "run").endswith("checkpoint-4")
            state.log_history.append({"seen": True})

    terminated(4, eval_strategy="epoch", save_strategy="epoch", callbacks=[Evaluated()])
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert {"seen": True} in state["log_history"]


def test_the_handler_that_was_there_gets_sigterm_after_the_checkpoint(build, train, tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(get_last_checkpoint(tmp_path / "run")))
    try:
        train(build(), save_strategy="epoch", trainer_kwargs={"callbacks": [Once(1, sigterm)]})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [str(tmp_path / "run" / "checkpoint-2")]


def test_without_checkpoints_sigterm_is_left_alone(build, train):
    seen = []
    train(build(), trainer_kwargs={"callbacks": [Once(1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))]})
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_train_loss_is_the_mean_over_the_steps_of_the_call(build, train, tmp_path):
    whole = train(build(), logging_steps=4, save_strategy="steps", save_steps=3)
    resumed = train(build(), logging_steps=4, resume=str(tmp_path / "run" / "checkpoint-3"))
    alone = train(build(), logging_steps=1, output_dir=str(tmp_path / "alone"))
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(alone.state.log_history[3]["loss"], rel=1e-5)
    assert whole.state.log_history[-1]["train_loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-5)


def test_a_disk_that_fills_up_costs_no_checkpoint(build, train, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(value, path, *args, **kwargs):
        calls.append(path)
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    words = (
        "checkpoint-4 could not be written to .*: .*No space left on device. Earlier checkpoints are as they were; "
    )
    with pytest.raises(OSError, match=words):
        train(build(), **SAVING)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    check_complete(tmp_path / "run" / "checkpoint-2")
    monkeypatch.undo()
    resumed = train(build(), resume=str(tmp_path / "run" / "checkpoint-2"), **SAVING)
    assert same_weights(resumed.model, train(build(), output_dir=str(tmp_path / "whole")).model)


def test_a_checkpoint_is_deleted_only_when_the_next_is_whole(build, train, tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []
    rename = os.rename

    def watched(source, target):
        seen.append((Path(source).name, sorted(path.name for path in folder.glob("checkpoint-*"))))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    train(build(), **SAVING)
    assert seen == [
        ("checkpoint-2", []),
        ("checkpoint-4", ["checkpoint-2"]),
        ("checkpoint-2", ["checkpoint-2", "checkpoint-4"]),
    ]
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]


def test_what_was_cut_off_is_no_checkpoint_and_is_removed(build, train, tmp_path, caplog):
    half = tmp_path / "run" / "_incomplete" / "checkpoint-9"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert get_last_checkpoint(tmp_path / "run") is None
    with caplog.at_level(logging.WARNING, logger="hf_selfkd"):
        train(build(), max_steps=1)
    assert "Removing checkpoint-9 from " in caplog.text
    assert not half.exists()


def test_a_checkpoint_of_the_same_step_is_replaced(build, train, tmp_path):
    train(build(), **SAVING)
    train(build(), learning_rate=0.5, **SAVING)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][0]["learning_rate"] == 0.5
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"optimizer.pt has [\d,]+ bytes instead of [\d,]+"),
        (lambda path: path.unlink(), "optimizer.pt is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(build, train, tmp_path, caplog, damage, words):
    train(build(), **(SAVING | {"save_total_limit": 2}))
    damage(tmp_path / "run" / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(ValueError, match=rf"checkpoint-4 is damaged: {words}. Copy it again, or resume from an earli"):
        train(build(), resume=str(tmp_path / "run" / "checkpoint-4"))
    with caplog.at_level(logging.WARNING, logger="hf_selfkd"):
        assert find_last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    assert "Passed over: The checkpoint" in caplog.text


def test_the_best_checkpoint_is_kept_under_its_own_name(build, train, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 3.0}
    trainer = train(build(), metric_for_best_model="loss_exit_0", num_train_epochs=2, **(SAVING | options))
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}")
    state = json.loads(Path(best, "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert same_weights(build().from_pretrained(best), trainer.model)


def test_weights_that_are_lost_replace_no_checkpoint(build, train, tmp_path):
    model = build()
    spoil = Once(4, lambda: model.exits[0].classifier.bias.data.fill_(float("inf")))
    with pytest.raises(FloatingPointError, match="No checkpoint was written at step 4: exits.0.classifier.bias holds"):
        train(model, trainer_kwargs={"callbacks": [spoil]}, **SAVING)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def test_a_run_that_is_over_takes_no_more_steps(build, train, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}  # an epoch has 4
    whole = train(build(), **options)
    resumed = train(build(), resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert resumed.state.global_step == 3
    assert same_weights(resumed.model, whole.model)


def test_resuming_with_another_network_is_refused(build, train, tmp_path):
    vit = "test_vit"  # all its stages have the same shapes
    train(build(vit, exits=[0, 1]), max_steps=2, **SAVING)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    words = r"The exits of .*checkpoint-2 sit at stages \[0, 1\], those of the model at \[0, 2\]"
    with pytest.raises(ValueError, match=words):
        train(build(vit, exits=[0, 2]), resume=checkpoint)


def test_resuming_with_a_larger_network_is_refused(build, train, tmp_path):
    train(build(exits=[1]), max_steps=2, **SAVING)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    config = json.loads((checkpoint / "config.json").read_text()) | {"exits": [1, 2]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "files.json").unlink()
    words = r"one of another network: it lacks exits.1.* in all\) and holds none \(0 in all\) beside it"
    with pytest.raises(ValueError, match=words):
        train(build(exits=[1, 2]), resume=str(checkpoint))


def test_batches_that_may_be_left_out_are_counted_on(build, train, images, tmp_path):
    data = [image | {"pixel_values": image["pixel_values"].clone()} for image in images]
    data[3]["pixel_values"][0, 0, 0] = float("nan")
    options = {"num_train_epochs": 2, "trainer_kwargs": {"train_dataset": data, "max_skipped_batches": 1}}
    with pytest.raises(FloatingPointError, match=r"for the samples .*\b3\b.* \(1 passed\)"):
        train(build(), save_strategy="epoch", **options)
    with pytest.raises(FloatingPointError, match=r"\(1 passed\)"):
        train(build(), resume=str(tmp_path / "run" / "checkpoint-4"), **options)
