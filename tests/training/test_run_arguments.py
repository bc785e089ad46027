"""What trackers of experiments store of a run: the method and its hyper-parameters too."""

import copy
import json
import pickle
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import timm
import transformers.integrations.integration_utils as integrations
from transformers import TrainingArguments

from hf_selfkd import SelfDistillationTrainer, get_method

EXPECTED = {"lr_milestones": [1.0, 2.5], "ema_decay": 0.5, "decay_norms": True}


@dataclass
class MyArguments(TrainingArguments):
    """Arguments of a script of one's own."""

    mine: int = 3


@pytest.fixture
def described(build, tmp_path):
    method = get_method(
        "eed+kd", eed={"temperature": 5.0}, kd={"teacher": timm.create_model("test_resnet", num_classes=5)}
    )
    args = MyArguments(str(tmp_path), use_cpu=True, learning_rate=0.25)
    return SelfDistillationTrainer(build(), args, method, **EXPECTED).args


def test_the_dictionary_has_the_method_and_the_trainers_settings(described):
    stored = json.loads(described.to_json_string())
    assert stored["method"]["name"] == "eed+kd"
    assert stored["method"]["eed"]["temperature"] == 5.0
    assert stored["method"]["kd"]["teacher"] == "test_resnet.r160_in1k"
    assert {name: stored[name] for name in EXPECTED} == EXPECTED
    assert (stored["mine"], stored["learning_rate"]) == (3, 0.25)
    assert "'temperature': 5.0" in described.to_sanitized_dict()["method"]


def test_copies_and_files_have_the_arguments_as_they_were_given(described):
    for other in (copy.copy(described), copy.deepcopy(described), pickle.loads(pickle.dumps(described))):
        assert type(other) is MyArguments
        assert (other.mine, other.learning_rate) == (3, 0.25)
        assert "method" not in other.to_dict()


def test_trackio_stores_them(build, train, monkeypatch):
    """As the stock callback does, with a stand-in for the package."""

    class Config(dict):
        def update(self, values, allow_val_change):
            super().update(values)

    config = Config()
    tracker = SimpleNamespace(
        init=lambda **kwargs: None,
        config=config,
        context_vars=SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None)),
        log=lambda values: None,
        finish=lambda: None,
        __version__="0.21.1",
    )
    monkeypatch.setattr(integrations, "is_trackio_available", lambda: True)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    options = {"trackio_static_space_id": False, "report_to": "trackio", "max_steps": 1}
    train(build(), get_method("byot", alpha=0.5), trainer_kwargs={"lr_milestones": [1]}, **options)
    assert config["method"] == get_method("byot", alpha=0.5).to_dict()
    assert config["lr_milestones"] == [1]


def test_a_trial_is_stored_with_its_own_method(described):
    trainer = described.describe.args[0]
    trainer.method = get_method("byot", alpha=0.25)
    assert described.to_dict()["method"]["alpha"] == 0.25
