"""SIGTERM: left alone by default, or a checkpoint from which the run continues as if it had not come."""

import json
import os
import signal

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_selfkd import SelfDistillationTrainer
from hf_selfkd.training.sigterm import TERMINATED, SaveOnSigterm
from tests.helpers.runs import Augmented, Once, logged, same_weights


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def terminated(build, train, images):
    """Train until SIGTERM comes in a step, and return the arguments with which to resume."""

    def terminated(step, callbacks=(), **args):
        data = {"train_dataset": Augmented(images), "ema_decay": 0.7, "save_on_sigterm": True}
        with pytest.raises(SystemExit) as end:
            train(build(), trainer_kwargs=data | {"callbacks": [Once(step - 1, sigterm), *callbacks]}, **args)
        assert end.value.code == 143
        return {"trainer_kwargs": data, **args}

    return terminated


# 3 is in the middle of an epoch of 4 steps and of a log entry of 2; 4 is the end of an epoch, with its evaluation.
@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_resuming_after_sigterm_equals_not_stopping(build, train, tmp_path, terminated, step):
    options = {"num_train_epochs": 3, "logging_steps": 3, "eval_strategy": "epoch", "save_strategy": "epoch"}
    handler = signal.getsignal(signal.SIGTERM)
    options = terminated(step, **options)
    assert signal.getsignal(signal.SIGTERM) is handler
    checkpoint = get_last_checkpoint(tmp_path / "run")
    assert checkpoint.endswith(f"checkpoint-{step}")
    resumed = train(build(), resume=checkpoint, **options)
    uninterrupted = train(build(), output_dir=str(tmp_path / "uninterrupted"), **options)
    assert same_weights(resumed.model, uninterrupted.model)
    assert logged(resumed) == logged(uninterrupted)
    assert len([entry for entry in logged(uninterrupted) if "eval_loss" in entry]) == 3
    assert not (tmp_path / "run" / "_incomplete").exists()


def test_the_last_step_of_an_epoch_is_saved_before_and_after_its_evaluation(terminated, tmp_path):
    class Evaluated(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            assert get_last_checkpoint(tmp_path / "run").endswith("checkpoint-4")
            state.log_history.append({"seen": True})

    terminated(4, eval_strategy="epoch", save_strategy="epoch", callbacks=[Evaluated()])
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert {"seen": True} in state["log_history"]


def test_an_earlier_handler_receives_sigterm_after_the_checkpoint(build, train, tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(get_last_checkpoint(tmp_path / "run")))
    try:
        options = {"callbacks": [Once(1, sigterm)], "save_on_sigterm": True}
        train(build(), save_strategy="epoch", trainer_kwargs=options)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [str(tmp_path / "run" / "checkpoint-2")]


def handler_in_training(build, train, **options):
    seen = []
    look = Once(1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    kwargs = {"callbacks": [look]} | options.pop("trainer_kwargs", {})
    train(build(), trainer_kwargs=kwargs, max_steps=1, **options)
    return seen[0]


def test_by_default_sigterm_is_left_alone(build, train):
    before = signal.getsignal(signal.SIGTERM)
    assert handler_in_training(build, train, save_strategy="epoch") is before


def test_both_switches_listen_without_the_stock_handler(build, train, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    ours = handler_in_training(build, train, trainer_kwargs={"save_on_sigterm": True})
    theirs = handler_in_training(build, train, enable_jit_checkpoint=True, save_strategy="epoch")
    assert ours.__func__ is theirs.__func__ is SaveOnSigterm._receive
    assert signal.getsignal(signal.SIGTERM) is before
    args = TrainingArguments(str(tmp_path), use_cpu=True, enable_jit_checkpoint=True)
    trainer = SelfDistillationTrainer(build(), args)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert "SaveOnSigterm" in names
    assert "JITCheckpointCallback" not in names


# Without training


@pytest.fixture
def loop():
    """Return a function that sends the events of one step to the callback, and its control."""
    callback, args = SaveOnSigterm(), TrainingArguments(use_cpu=True)

    def step(epoch, signalled):
        state, control = TrainerState(epoch=epoch, global_step=3, max_steps=9), TrainerControl()
        callback.received = signalled
        callback.on_pre_optimizer_step(args, state, control)
        callback.on_step_end(args, state, control)
        at_step = control.should_save, control.should_training_stop
        control.should_save, control.should_log, control.should_evaluate = False, True, True
        callback.on_epoch_end(args, state, control)
        return at_step, (control.should_save, control.should_log, control.should_evaluate)

    return step


def test_decisions_of_a_step(loop):
    assert loop(0.5, signalled=False) == ((False, False), (False, True, True))
    assert loop(0.5, signalled=True) == ((True, True), (False, False, False))  # the epoch is broken off
    assert loop(1.0, signalled=True) == ((True, True), (True, True, True))  # its end logs, evaluates and is saved


def test_the_process_ends_with_the_status_of_sigterm():
    callback = SaveOnSigterm()
    with pytest.raises(SystemExit) as end, callback.listening():
        sigterm()
        assert callback.received
    assert end.value.code == TERMINATED == 143
    with callback.listening():  # the next run starts again
        assert not callback.received


def test_a_signal_that_is_ignored_remains_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with SaveOnSigterm().listening():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
