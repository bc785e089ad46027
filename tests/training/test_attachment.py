"""What only trains comes off the model when training ends, and training again continues with it."""

import copy

import pytest
import torch

from hf_selfkd import Method, SelfDistillationTrainer
from tests.helpers.runs import Once, losses, same_weights

OFF = (None, False, True)


def parts(model):
    return model.scaffold, model.detach_exits, model.returns_maps


def logged_terms_add_up(trainer):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in entries:
        terms = sum(value for name, value in entry.items() if name.startswith("loss/"))
        assert terms == pytest.approx(entry["loss"], rel=1e-4)
    return bool(entries)


@pytest.mark.parametrize("method", ["byot", "frskd", "okd_mde"])
def test_a_trained_model_has_the_state_of_a_fresh_one(build, train, method):
    trainer = train(build(), method, max_steps=1)
    assert parts(trainer.model) == OFF
    build().load_state_dict(trainer.model.state_dict())
    assert (trainer.scaffold is None) == (method == "byot")


def train_twice(trainer):
    trainer.train()
    return losses(trainer), copy.deepcopy(trainer.scaffold)


@pytest.mark.parametrize("method", ["frskd", pytest.param("okd_mde", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_training_again_is_as_if_nothing_had_come_off(build, train, monkeypatch, method):
    options = {"max_steps": 2, "optim_args": "momentum=0.9"}
    again = train(build(), method, **options)
    found, scaffold = train_twice(again)
    assert parts(again.model) == OFF
    monkeypatch.setattr(Method, "detach", lambda self, model: None)
    kept = train(build(), method, **options)
    assert kept.model.scaffold is not None
    expected, expected_scaffold = train_twice(kept)
    assert found == expected
    assert same_weights(scaffold, expected_scaffold)


def test_the_same_trainer_resumes_exactly(build, train, tmp_path):
    trainer = train(build(), "frskd", max_steps=4, save_strategy="steps", save_steps=2, optim_args="momentum=0.9")
    model, scaffold, expected = copy.deepcopy((trainer.model, trainer.scaffold, losses(trainer)))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(trainer) == expected
    assert same_weights(trainer.model, model)
    assert same_weights(trainer.scaffold, scaffold)


@pytest.mark.slow
def test_after_an_interrupt_training_starts_again_and_its_terms_add_up(build, train):
    def interrupt():
        raise KeyboardInterrupt

    trainer = train(build(), "frskd", max_steps=3, logging_steps=2)  # the last step is not logged
    interruption = Once(1, interrupt)
    trainer.add_callback(interruption)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert parts(trainer.model) == OFF
    assert not trainer.is_in_train
    trainer.remove_callback(interruption)
    trainer.train()
    assert logged_terms_add_up(trainer)


@pytest.mark.slow
def test_a_retry_with_smaller_batches_logs_its_own_terms(build, train, monkeypatch):
    step, calls = SelfDistillationTrainer.training_step, []

    def run_out_of_memory_once(self, *args, **kwargs):
        calls.append(self._train_batch_size)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SelfDistillationTrainer, "training_step", run_out_of_memory_once)
    trainer = train(build(), "frskd", auto_find_batch_size=True, logging_steps=2, per_device_train_batch_size=10)
    assert calls[0] > calls[-1]
    assert logged_terms_add_up(trainer)
    assert parts(trainer.model) == OFF
