"""The private parts of transformers' Trainer that the trainer depends on, against the installed version."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import transformers
from transformers import Trainer

import hf_selfkd.training
from hf_selfkd import SelfDistillationTrainer
from hf_selfkd.training.loss_sums import PRIVATE_FIELDS
from hf_selfkd.training.trainer import PRIVATE_HOOKS

# Their parameters, as the overrides pass them on. In a run that is resumed, pushes and loads its best model, all of
# these are called.
PARAMETERS = {
    "_get_train_sampler": ["self", "train_dataset"],
    "_prepare_inputs": ["self", "inputs"],
    "_init_training_state": [
        *("self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial")
    ],
    "_get_output_dir": ["self", "trial"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
}
# Public, but not documented as hooks.
PUBLIC = {
    "set_initial_training_values": ["self", "args", "dataloader"],
    "create_scheduler": ["self", "num_training_steps", "optimizer"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "log": ["self", "logs", "start_time"],
}
SOURCE = inspect.getsource(transformers.trainer)


def test_the_overrides_are_those_listed():
    own = {name for name in vars(SelfDistillationTrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in own if hasattr(Trainer, name)} == PRIVATE_HOOKS.keys() == PARAMETERS.keys()
    assert len(PRIVATE_HOOKS) <= 8


@pytest.mark.parametrize(("name", "parameters"), (PARAMETERS | PUBLIC).items())
def test_hooks_have_the_same_parameters(name, parameters):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters
    assert list(inspect.signature(getattr(SelfDistillationTrainer, name)).parameters) == parameters


def private_names(path):
    """Return the private attributes that a file touches and that are Trainer's."""
    tree = ast.parse(path.read_text())
    touched = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    touched = {name for name in touched if not name.startswith("__")}
    return {name for name in touched if hasattr(Trainer, name) or re.search(rf"self\.{name}\b.*? = ", SOURCE)}


@pytest.mark.parametrize("path", sorted(Path(hf_selfkd.training.__file__).parent.glob("*.py")), ids=lambda p: p.stem)
def test_only_one_module_touches_private_fields(path):
    allowed = PRIVATE_FIELDS.keys() if path.stem == "loss_sums" else PRIVATE_HOOKS.keys()
    assert private_names(path) <= allowed


def test_all_of_them_are_called_in_a_run(hub, build, train, tmp_path, monkeypatch):
    called = set()
    for name in PRIVATE_HOOKS:
        original = getattr(SelfDistillationTrainer, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            called.add(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(SelfDistillationTrainer, name, spy)
    monkeypatch.setenv("HF_TOKEN", "hf_of_ada")
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    options = {"push_to_hub": True, "hub_model_id": "ada/run", "load_best_model_at_end": True} | saving
    trainer = train(build(), **options)
    for name in PRIVATE_FIELDS:
        assert hasattr(trainer, name), name
    train(build(), resume=str(tmp_path / "run" / "checkpoint-2"), **options)
    assert called == PRIVATE_HOOKS.keys()
