"""A checkpoint is loaded completely or not at all, with an error that names the reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_selfkd import ExitPolicy, MultiExitForImageClassification

POLICY = ExitPolicy(thresholds=[0.5, 0.5]).to_dict()


@pytest.fixture
def saved(build, tmp_path):
    """Save a model with two auxiliary exits and return its folder, its weights and its configuration."""
    model = build("test_vit", exits=[0, 2])  # all stages have the same shapes
    model.save_pretrained(tmp_path)
    return tmp_path, load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())


def load(folder, **kwargs):
    return AutoModelForImageClassification.from_pretrained(folder, **kwargs)


def write(folder, state=None, config=None):
    if state is not None:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def test_missing_and_extra_weights(saved):
    folder, state, _ = saved
    lacking = {name: tensor for name, tensor in state.items() if name != "exits.1.norm.weight"}
    write(folder, lacking)
    with pytest.raises(
        ValueError, match=r"Missing keys: exits.1.norm.weight \(1 in all\). Unexpected keys: none \(0 in all\)"
    ):
        load(folder)
    write(folder, state | {"scaffold.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"Missing keys: none .* Unexpected keys: scaffold.weight \(1 in all\)"):
        load(folder)


def test_other_shapes(saved):
    folder, state, _ = saved
    write(folder, state | {"exits.0.norm.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"other shapes than the model: exits.0.norm.bias is \(3,\) instead of \(64"):
        load(folder)


@pytest.mark.parametrize("change", [{"backbone": "test_resnet", "backbone_kwargs": {}, "exits": None}, {"exits": [0]}])
def test_another_network_than_the_configuration_describes(saved, change):
    folder, _, config = saved
    write(folder, config=config | change)
    with pytest.raises(ValueError, match="do not match its configuration. Missing keys: "):
        load(folder)


@pytest.mark.parametrize("exits", [[0, 1], [1, 2]])
def test_other_exits_of_the_same_shapes(saved, exits):
    folder, _, _ = saved
    words = rf"The exits of .* sit at stages \[0, 2\], those of the model at \[{exits[0]}, {exits[1]}\]"
    with pytest.raises(ValueError, match=words):
        load(folder, exits=exits)
    assert load(folder).exit_stages == [0, 2]


@pytest.mark.slow
def test_default_exits_are_told_from_others_too(build, tmp_path):
    build("test_vit", exits=None).save_pretrained(tmp_path)
    chosen = load(tmp_path).exit_stages
    assert load(tmp_path, exits=chosen).exit_stages == chosen
    others = [stage + 1 for stage in chosen]
    with pytest.raises(ValueError, match="sit at stages"):
        load(tmp_path, exits=others)


@pytest.mark.parametrize("length", [0, 7, 5000, -1])
def test_a_file_that_is_cut_off(saved, length):
    folder, _, _ = saved
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(ValueError, match="The weights in .* cannot be read: .* The file is truncated or corrupt"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"exits": "02"}, "exits must be a list of stage indices such as"),
        ({"exits": [0, 9]}, "test_vit has .* stages .*, but exits asks for stage 9"),
        ({"ensemble": 1}, "ensemble must be True or False, but got 1"),
        ({"backbone": "hf-hub:x/y"}, "may only name a timm architecture"),
        ({"backbone_kwargs": {"checkpoint_path": "x"}}, "backbone_kwargs must not contain checkpoint_path"),
        ({"problem_type": "regression"}, "problem_type must be single_label_classification or None"),
        ({"early_exit": True}, "early_exit needs a policy, but none was given and config.exit_policy is None"),
        (
            {"exit_policy": POLICY | {"thresholds": [0.5], "temperatures": [1.0, 1.0]}},
            "is for 2 exits, but there are 3",
        ),
        ({"exit_policy": {"criterion": "confidence"}}, "thresholds is missing|temperatures, thresholds is missing"),
        ({"exit_policy": POLICY | {"criterion": "luck"}}, "Unknown criterion 'luck'"),
    ],
)
def test_fields_given_to_from_pretrained_are_checked_like_those_in_the_file(saved, fields, words):
    folder, _, config = saved
    with pytest.raises(ValueError, match=words):
        load(folder, **fields)
    write(folder, config=config | fields)
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_a_policy_that_fits_is_loaded(saved):
    folder, _, config = saved
    write(folder, config=config | {"exit_policy": POLICY, "early_exit": True})
    assert load(folder).eval()(torch.randn(1, 3, 32, 32)).exit_index.shape == (1,)


def test_unknown_fields_are_kept_with_a_warning(saved):
    folder, _, config = saved
    write(folder, config=config | {"exit_widht": 32})
    with pytest.warns(UserWarning, match="Unknown configuration fields are kept but unused: exit_widht."):
        model = load(folder)
    assert model.config.exit_widht == 32
    model.save_pretrained(folder / "again")
    assert json.loads((folder / "again" / "config.json").read_text())["exit_widht"] == 32


def test_a_configuration_as_transformers_writes_it_gives_no_warning(saved, recwarn):
    folder, _, config = saved
    write(folder, config=config | {"use_cache": False})
    MultiExitForImageClassification.from_pretrained(folder)
    assert not [warning for warning in recwarn if "Unknown configuration" in str(warning.message)]


def test_what_a_data_configuration_lacks_comes_from_the_backbone(build, tmp_path):
    model = build("test_convnext", pretrained_cfg={"mean": [0.1, 0.2, 0.3]})
    assert model.config.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert model.config.pretrained_cfg["input_size"] == list(model.backbone.pretrained_cfg["input_size"])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("kind", ["build", "build_segmenter"])
def test_fields_that_are_set_later_have_their_effect(kind, request, batch):
    model = request.getfixturevalue(kind)().eval()
    images = batch["pixel_values"]
    assert model(images).exit_maps is None
    model.config.output_hidden_states = True
    assert model(images).exit_maps is not None
    assert model(images, output_hidden_states=False).exit_maps is None
    model.config.output_hidden_states, model.config.return_dict = False, False
    logits = model(images)[0]
    assert torch.equal(logits, model(images, return_dict=True).logits)
