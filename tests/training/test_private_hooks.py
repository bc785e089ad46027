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
from tests.helpers.private_hooks import HOOK_PARAMETERS

# Public, but not documented as hooks.
PUBLIC = (
    "set_initial_training_values",
    "create_optimizer",
    "create_scheduler",
    "save_model",
    "log",
    "training_step",
    "prediction_step",
    "evaluation_loop",
    "hyperparameter_search",
)
SOURCE = inspect.getsource(transformers.trainer)


def test_the_overrides_are_those_listed():
    classes = [kind for kind in SelfDistillationTrainer.__mro__ if kind.__module__.startswith("hf_selfkd.")]
    names = {name for kind in classes for name in vars(kind)}
    own = {name for name in names if name.startswith("_") and not name.startswith("__")}
    assert {name for name in own if hasattr(Trainer, name)} == PRIVATE_HOOKS.keys() == HOOK_PARAMETERS.keys()
    assert len(PRIVATE_HOOKS) <= 8


@pytest.mark.parametrize("name", [*HOOK_PARAMETERS, *PUBLIC])
def test_overrides_have_the_parameters_of_the_stock_trainer(name):
    found = [list(inspect.signature(getattr(owner, name)).parameters) for owner in (SelfDistillationTrainer, Trainer)]
    assert found[0] == found[1]
    assert name in PUBLIC or found[1] == HOOK_PARAMETERS[name]


def private_names(path):
    """Return the private attributes that a file touches and that are Trainer's."""
    tree = ast.parse(path.read_text())
    touched = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    touched = {name for name in touched if not name.startswith("__")}
    return {name for name in touched if hasattr(Trainer, name) or re.search(rf"self\.{name}\b.*? = ", SOURCE)}


@pytest.mark.parametrize("path", sorted(Path(hf_selfkd.training.__file__).parent.glob("*.py")), ids=lambda p: p.stem)
def test_only_one_module_touches_private_fields(path):
    fields = {"loss_sums": PRIVATE_FIELDS.keys(), "versions": {"_initial_global_step"}}
    assert private_names(path) <= fields.get(path.stem, PRIVATE_HOOKS.keys())


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
