import json

import pytest

from hf_selfkd import MultiExitConfig


def test_round_trip(tmp_path):
    config = MultiExitConfig(
        backbone="resnet18.a1_in1k",
        backbone_kwargs={"in_chans": 1},
        exits=(1, 3),
        exit_width=32,
        small_input_stem=True,
        exit_policy={"criterion": "confidence"},
        early_exit=True,
        ensemble=True,
        num_labels=7,
    )
    config.save_pretrained(tmp_path)
    assert MultiExitConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "multi_exit"


@pytest.mark.parametrize("backbone", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:/etc", "timm/resnet18", "", 18, None])
def test_a_configuration_names_an_architecture_and_nothing_to_fetch(backbone):
    with pytest.raises(ValueError, match="backbone"):
        MultiExitConfig(backbone=backbone)


@pytest.mark.parametrize(
    "name",
    ["pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"]
    + ["scriptable", "num_classes"],
)
def test_refused_backbone_kwargs_are_named(name):
    with pytest.raises(ValueError, match=f"backbone_kwargs must not contain {name}: "):
        MultiExitConfig(backbone_kwargs={name: True})


@pytest.mark.parametrize(
    ("exits", "words"),
    [
        ([3, 1], "in increasing order, but got [3, 1]. Did you mean [1, 3]?"),
        ([1, 1, 2], "in increasing order, but got [1, 1, 2]. Did you mean [1, 2]?"),
        ([1.5], "stage indices such as [1, 2, 3], but got [1.5]"),
        ([True], "stage indices such as [1, 2, 3], but got [True]"),
        ("123", "stage indices such as [1, 2, 3], but got '123'"),
    ],
)
def test_exits_that_make_no_sense(exits, words):
    with pytest.raises(ValueError) as error:
        MultiExitConfig(exits=exits)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exit_width", 0),
        ("exit_width", 1.5),
        ("small_input_stem", "yes"),
        ("early_exit", 1),
        ("ensemble", None),
        ("exit_policy", "confidence"),
        ("pretrained_cfg", [3, 32, 32]),
        ("backbone_kwargs", [1]),
    ],
)
def test_fields_of_the_wrong_type_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be "):
        MultiExitConfig(**{field: value})


def test_the_callers_kwargs_are_not_touched():
    kwargs = {"in_chans": 1}
    MultiExitConfig(backbone_kwargs=kwargs).backbone_kwargs["in_chans"] = 4
    assert kwargs == {"in_chans": 1}
