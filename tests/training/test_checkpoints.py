"""Checkpoints are complete or absent, whatever stops the run."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from hf_selfkd.training import find_last_checkpoint
from hf_selfkd.training.checkpoints import (
    SCAFFOLD_NAME,
    check_complete,
    check_method,
    commit_checkpoint,
    load_scaffold,
    load_state,
    remove_incomplete,
    save_method,
    save_state,
    written_aside,
)
from tests.helpers.runs import same_weights

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


def write(folder, step, content=b"weights", *, limit=None, best=None):
    """Write a checkpoint of one file."""
    name, last = f"checkpoint-{step}", get_last_checkpoint(folder)
    with written_aside(str(folder), name) as aside:
        written = Path(aside, name)
        written.mkdir(parents=True)
        (written / "model.bin").write_bytes(content)
        assert get_last_checkpoint(folder) == last
        commit_checkpoint(str(folder), name, limit, best)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_gets_its_name_when_it_is_complete(tmp_path):
    write(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2"]
    assert json.loads((tmp_path / "checkpoint-2" / "files.json").read_text()) == {"model.bin": 7}


def test_a_failure_leaves_the_earlier_checkpoints(tmp_path):
    write(tmp_path, 2)
    for error, expected in ((OSError(28, "No space left"), OSError), (ValueError("no space"), RuntimeError)):
        with pytest.raises(expected, match="checkpoint-4 could not be written to .*pace"):
            with written_aside(str(tmp_path), "checkpoint-4") as aside:
                Path(aside, "checkpoint-4").mkdir(parents=True)
                raise error
        assert names(tmp_path) == ["checkpoint-2"]
        check_complete(str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 2, b"old")
    write(tmp_path, 2, b"new")
    assert (tmp_path / "checkpoint-2" / "model.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    write(tmp_path, 8, limit=1, best=str(tmp_path / "checkpoint-4"))
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]


def test_a_checkpoint_is_deleted_only_when_the_next_is_complete(tmp_path, monkeypatch):
    seen, rename = [], os.rename

    def watched(source, target):
        seen.append((Path(source).name, sorted(path.name for path in tmp_path.glob("checkpoint-*"))))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    write(tmp_path, 2, limit=1)
    write(tmp_path, 4, limit=1)
    assert seen == [
        ("checkpoint-2", []),
        ("checkpoint-4", ["checkpoint-2"]),
        ("checkpoint-2", ["checkpoint-2", "checkpoint-4"]),
    ]
    assert names(tmp_path) == ["checkpoint-4"]


def test_an_incomplete_checkpoint_is_not_found_and_is_removed(tmp_path, caplog):
    half = tmp_path / "_incomplete" / "checkpoint-9"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert get_last_checkpoint(tmp_path) is None
    with caplog.at_level(logging.WARNING, logger="hf_selfkd"):
        remove_incomplete(str(tmp_path))
    assert "checkpoint-9" in caplog.text
    assert names(tmp_path) == []
    remove_incomplete(str(tmp_path))  # nothing to do


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "model.bin has 6 bytes instead of 7"),
        (lambda path: path.unlink(), "model.bin is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, caplog, damage, words):
    write(tmp_path, 2)
    write(tmp_path, 10)
    damage(tmp_path / "checkpoint-10" / "model.bin")
    with pytest.raises(ValueError, match=rf"checkpoint-10 is damaged: {words}"):
        check_complete(str(tmp_path / "checkpoint-10"))
    with caplog.at_level(logging.WARNING, logger="hf_selfkd"):
        assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-10 is damaged" in caplog.text
    damage(tmp_path / "checkpoint-2" / "model.bin")
    assert find_last_checkpoint(str(tmp_path)) is None


def test_a_folder_of_another_trainer_is_taken_as_it_is(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    check_complete(str(tmp_path / "checkpoint-1"))
    check_method(str(tmp_path / "checkpoint-1"), "byot")
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")


def test_the_method_is_checked(tmp_path):
    save_method(str(tmp_path), "byot")
    check_method(str(tmp_path), "byot")
    with pytest.raises(ValueError, match="written by method 'byot', but this run trains with 'eed'"):
        check_method(str(tmp_path), "eed")


def test_a_scaffold_is_loaded_completely_or_not(tmp_path):
    scaffold = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="no scaffold.safetensors: the run that wrote it had no scaffold"):
        load_scaffold(scaffold, str(tmp_path))
    save_state(scaffold.state_dict(), str(tmp_path), SCAFFOLD_NAME)
    other = torch.nn.Linear(2, 3)
    load_scaffold(other, str(tmp_path))
    assert same_weights(other, scaffold)
    with pytest.raises(ValueError, match="another method or another network: it differs in .*0.bias"):
        load_scaffold(torch.nn.Sequential(scaffold), str(tmp_path))
    assert load_state(str(tmp_path), SCAFFOLD_NAME, "scaffold").keys() == {"weight", "bias"}


# In training


def test_a_disk_that_fills_up_costs_no_checkpoint(build, train, tmp_path, monkeypatch):
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-4 could not be written to .*: .*No space left on device"):
        train(build(), **SAVING)
    assert names(tmp_path / "run") == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = train(build(), resume=str(tmp_path / "run" / "checkpoint-2"), **SAVING)
    assert same_weights(resumed.model, train(build(), output_dir=str(tmp_path / "uninterrupted")).model)


def test_the_best_checkpoint_is_recorded_under_its_own_name(build, train, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 3.0}
    trainer = train(build(), metric_for_best_model="exit_0_loss", num_train_epochs=2, **(SAVING | options))
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}")
    state = json.loads(Path(best, "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    weights = load_file(Path(best, "model.safetensors"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_a_checkpoint_holds_everything_under_its_names(build, train, tmp_path):
    """Checkpoints of earlier versions have these names, and those of this version are read by later ones."""
    train(build(), "frskd", **SAVING, max_steps=2, trainer_kwargs={"ema_decay": 0.5})
    checkpoint = tmp_path / "run" / "checkpoint-2"
    ours = {"scaffold.safetensors", "ema.safetensors", "method.json", "files.json", "process_0.safetensors"}
    stock = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert ours | stock <= set(names(checkpoint))
    assert json.loads((checkpoint / "method.json").read_text()) == {"name": "frskd"}
    assert {"steps", "last_logged", "loss", "mean_loss"} <= load_file(checkpoint / "process_0.safetensors").keys()
    assert load_file(checkpoint / "ema.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()
    assert "loss/label" in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"][0]
