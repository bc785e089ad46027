"""A resumed run is the run that never stopped, or is refused."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from hf_selfkd import get_method
from hf_selfkd.functional import cross_entropy
from hf_selfkd.training.resume import check_checkpoint, check_finite, inference_weights
from tests.helpers.runs import Augmented, Once, losses, same_weights
from tests.helpers.versions import needs_train_loss_of_the_call

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


class Scaffold(torch.nn.Linear):
    """A module used only in training that takes part in the loss."""

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


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_resuming_equals_not_stopping(build, images, scaffolded, tmp_path, train, workers):
    data = {"trainer_kwargs": {"train_dataset": Augmented(images)}, "dataloader_num_workers": workers}
    uninterrupted = train(build(), scaffolded, num_train_epochs=2, output_dir=str(tmp_path / "a"), **data)
    train(build(), scaffolded, num_train_epochs=2, save_strategy="steps", save_steps=3, **data)
    checkpoint = tmp_path / "run" / "checkpoint-3"  # in the middle of the first epoch
    assert set(load_file(checkpoint / "scaffold.safetensors")) == {"weight", "bias"}
    resumed = train(build(), scaffolded, num_train_epochs=2, resume=str(checkpoint), **data)
    assert losses(resumed) == losses(uninterrupted)
    assert same_weights(resumed.model, uninterrupted.model)
    assert same_weights(resumed.scaffold, uninterrupted.scaffold)


def test_resuming_with_other_settings_is_refused(build, scaffolded, tmp_path, train):
    train(build(), scaffolded, save_strategy="steps", save_steps=3, max_steps=3)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ValueError, match="written by method 'byot', but this run trains with 'eed'"):
        train(build(), "eed", resume=checkpoint)
    with pytest.raises(ValueError, match="no ema.safetensors: the run that wrote it had no ema_decay"):
        train(build(), scaffolded, resume=checkpoint, trainer_kwargs={"ema_decay": 0.9})
    Path(checkpoint, "scaffold.safetensors").unlink()
    with pytest.raises(ValueError, match="damaged: scaffold.safetensors is missing"):
        train(build(), scaffolded, resume=checkpoint)


@needs_train_loss_of_the_call
def test_train_loss_is_the_mean_over_the_steps_of_the_call(build, train, tmp_path):
    uninterrupted = train(build(), logging_steps=4, save_strategy="steps", save_steps=3)
    resumed = train(build(), logging_steps=4, resume=str(tmp_path / "run" / "checkpoint-3"))
    alone = train(build(), logging_steps=1, output_dir=str(tmp_path / "alone"))
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(alone.state.log_history[3]["loss"], rel=1e-5)
    assert uninterrupted.state.log_history[-1]["train_loss"] == pytest.approx(
        uninterrupted.state.log_history[0]["loss"], rel=1e-5
    )


def test_a_run_that_is_over_takes_no_more_steps(build, train, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}  # an epoch has 4
    uninterrupted = train(build(), **options)
    resumed = train(build(), resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert resumed.state.global_step == 3
    assert same_weights(resumed.model, uninterrupted.model)


def test_weights_that_are_not_finite_replace_no_checkpoint(build, train, tmp_path):
    model = build()
    spoil = Once(4, lambda: model.exits[0].classifier.bias.data.fill_(float("inf")))
    with pytest.raises(FloatingPointError, match="No checkpoint was written at step 4: exits.0.classifier.bias holds"):
        train(model, trainer_kwargs={"callbacks": [spoil]}, **SAVING)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


# Without training


@pytest.fixture
def saved(build, tmp_path):
    """Return a model with two exits and its folder."""
    model = build(exits=[1])
    model.save_pretrained(tmp_path / "saved")
    return model, str(tmp_path / "saved")


def test_a_checkpoint_of_the_same_network_passes(saved):
    model, folder = saved
    check_checkpoint(folder, model, "byot")
    get_method("frskd").attach(model)  # its scaffold is in another file
    check_checkpoint(folder, model, "frskd")


def test_a_checkpoint_with_exits_at_other_stages_is_refused(build, tmp_path):
    build("test_vit", exits=[0, 1]).save_pretrained(tmp_path)  # all its stages have the same shapes
    with pytest.raises(ValueError, match=r"stages \[0, 1\], those of the model at \[0, 2\]"):
        check_checkpoint(str(tmp_path), build("test_vit", exits=[0, 2]), "byot")


def test_a_checkpoint_of_a_smaller_network_is_refused(build, saved):
    _, folder = saved
    config = json.loads(Path(folder, "config.json").read_text()) | {"exits": [1, 2]}
    Path(folder, "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another network: it lacks exits.1.* and has none"):
        check_checkpoint(folder, build(exits=[1, 2]), "byot")


@pytest.mark.parametrize("sharded", [False, True])
def test_unknown_weights_are_refused(build, saved, sharded):
    model, folder = saved
    if sharded:
        Path(folder, "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="200KB")
        index = json.loads(Path(folder, "model.safetensors.index.json").read_text())
        check_checkpoint(folder, model, "byot")
        index["weight_map"]["more"] = "model-00001.safetensors"
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        weights = load_file(Path(folder, "model.safetensors")) | {"more": torch.zeros(1)}
        save_file(weights, Path(folder, "model.safetensors"))
    with pytest.raises(ValueError, match=r"lacks none \(0 in all\) and has more \(1 in all\)"):
        check_checkpoint(folder, model, "byot")


def test_weights_that_are_not_finite_are_named(build):
    model = build()
    check_finite(model, 3)
    other = copy.deepcopy(model)
    other.exits[0].classifier.bias.data[1] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 3: exits.0.classifier.bias"):
        check_finite(other, 3)


def test_the_scaffold_returns_after_an_error(build):
    model = build()
    get_method("frskd").attach(model)
    scaffold, trainer = model.scaffold, SimpleNamespace(model=model, network=model, accelerator=Accelerator(cpu=True))
    with pytest.raises(RuntimeError, match="while loading"), inference_weights(trainer):
        assert model.scaffold is None
        raise RuntimeError("while loading")
    assert model.scaffold is scaffold
