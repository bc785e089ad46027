"""Checkpoints from anyone: nothing runs, is fetched or takes memory that was not asked for."""

import json
import shutil
import socket

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation

from hf_selfkd import MultiExitConfig, MultiExitForImageClassification, MultiExitForSemanticSegmentation
from hf_selfkd.models import untrusted
from tests.helpers.memory import memory_limit
from tests.helpers.runs import same_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved classifier and a saved segmentation model."""
    folder = tmp_path_factory.mktemp("saved")
    MultiExitForImageClassification.from_backbone("test_resnet", num_labels=5).save_pretrained(folder / "model")
    maps = MultiExitForSemanticSegmentation.from_backbone("test_resnet", num_labels=5, pyramid_width=8)
    maps.save_pretrained(folder / "maps")
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A classifier's folder, to be changed."""
    return shutil.copytree(saved / "model", tmp_path / "model")


@pytest.fixture
def offline(monkeypatch):
    """Refuse every connection."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"connected to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def edit(folder, **fields):
    """Change fields of config.json; ``None`` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def loading_fails(loader, folder):
    """Return the message of the error with which loading fails before it takes 500 MB."""
    with pytest.raises(ValueError) as error, memory_limit(500_000_000):
        loader.from_pretrained(folder)
    return str(error.value)


def test_the_memory_limit_is_effective():
    torch.empty(300_000_000, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="memory"), memory_limit(500_000_000):
        torch.empty(600_000_000, dtype=torch.uint8)
    torch.empty(600_000_000, dtype=torch.uint8)


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18", "local-dir:/etc", "timm/resnet18", "../resnet18"]
)
def test_a_configuration_names_nothing_to_fetch(checkpoint, offline, monkeypatch, name):
    edit(checkpoint, backbone=name)
    monkeypatch.setattr(timm, "create_model", None)
    words = loading_fails(AutoModelForImageClassification, checkpoint)
    assert f"A configuration may only name a timm architecture, but got backbone={name!r}" in words


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretrained", True),
        ("checkpoint_path", "/etc/passwd"),
        ("pretrained_cfg", {"url": "http://127.0.0.1/x"}),
        ("pretrained_cfg_overlay", {"file": "/etc/passwd"}),
        ("cache_dir", "/tmp"),
        ("pretrained_model_args", {}),
        ("device", "cpu"),
    ],
)
def test_timm_is_told_nothing_that_makes_it_read_or_fetch(checkpoint, offline, monkeypatch, name, value):
    edit(checkpoint, backbone_kwargs={name: value})
    monkeypatch.setattr(timm, "create_model", None)
    words = loading_fails(AutoModelForImageClassification, checkpoint)
    assert words.startswith(f"backbone_kwargs must not contain {name}: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [("transformers_weights", "adapter_model.bin"), ("attn_implementation", "someone/kernel")],
)
def test_transformers_is_told_nothing_that_makes_it_read_or_fetch(checkpoint, offline, field, value):
    edit(checkpoint, **{field: value})
    assert loading_fails(AutoModelForImageClassification, checkpoint).startswith(f"{field} must not")


def test_an_honest_checkpoint_loads_without_a_connection(checkpoint, offline):
    assert AutoModelForImageClassification.from_pretrained(checkpoint).num_exits == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_labels": 10**9, "id2label": None}, "num_labels must be an integer from 1 to 200,000, but got 1000"),
        ({"num_labels": 10**9}, "num_labels must be an integer from 1 to 200,000, but got 1000000000."),
        ({"exit_width": 10**9}, "exit_width must be an integer from 1 to 65,536 or None, but got 1000000000."),
        (
            {"exit_width": 60_000, "num_labels": 1_000, "id2label": None},
            "more are requested by num_labels=1000, exit_width=60000",
        ),
        (
            {"backbone_kwargs": {"layers": [1e6, 1, 1, 1]}},
            "Numbers in backbone_kwargs may be 65,536 at most, but got 1000",
        ),
        (
            {"backbone_kwargs": {"channels": [60_000] * 4}},
            "backbone_kwargs={'channels': [60000, 60000, 60000, 60000]}",
        ),
        (
            {"backbone_kwargs": {"layers": [60_000, 1, 1, 1]}},
            "A backbone may have 300 tensors, but more are requested",
        ),
        ({"backbone_kwargs": {"stem_width": -1}}, "No backbone can be built from num_labels=5"),
        ({"pretrained_cfg": {"input_size": [3, 10**6, 32]}}, "pretrained_cfg has input_size=[3, 1000000, 32]"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 1e-6}}, "and crop_pct=1e-06"),
    ],
)
def test_hostile_sizes_are_refused_before_they_take_memory(checkpoint, monkeypatch, fields, words):
    assert untrusted.MAX_TENSORS == 10_000
    monkeypatch.setattr(untrusted, "MAX_TENSORS", 300)  # as many modules take a while to build
    edit(checkpoint, **fields)
    assert words in loading_fails(AutoModelForImageClassification, checkpoint)


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (10**9, "pyramid_width must be an integer from 1 to 65,536, but got 1000000000."),
        (60_000, "pyramid_width=60000"),
    ],
)
def test_hostile_pyramids_are_refused_before_they_take_memory(saved, tmp_path, width, words):
    folder = shutil.copytree(saved / "maps", tmp_path / "maps")
    edit(folder, pyramid_width=width)
    assert words in loading_fails(AutoModelForSemanticSegmentation, folder)


@pytest.mark.parametrize("model_class", [MultiExitForImageClassification, MultiExitForSemanticSegmentation])
def test_a_hostile_configuration_is_refused_without_a_checkpoint_too(model_class, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_VALUES", 1_000_000)
    small = {} if model_class is MultiExitForImageClassification else {"pyramid_width": 8}
    model_class(MultiExitConfig(backbone="test_resnet", num_labels=5, **small))
    monkeypatch.setattr(torch, "empty", only_on_meta(torch.empty))
    with pytest.raises(
        ValueError, match=r"A model may have 1,000,000 values, but [\d,]+ are requested by num_labels=90,"
    ):
        model_class(
            MultiExitConfig(backbone="test_resnet", num_labels=90, **{n: 1_000 for n in small or ["exit_width"]})
        )


def only_on_meta(factory):
    """Wrap a function that makes a tensor, such that it takes no memory."""

    def make(*args, **kwargs):
        tensor = factory(*args, **kwargs)
        assert tensor.is_meta or tensor.numel() < 10_000
        return tensor

    return make


def test_a_few_new_values_are_no_offence(checkpoint, monkeypatch):
    load = MultiExitForImageClassification.from_pretrained
    assert load(checkpoint, num_labels=100, ignore_mismatched_sizes=True).config.num_labels == 100
    monkeypatch.setattr(untrusted, "MAX_NEW_VALUES", 10)
    assert load(checkpoint).config.num_labels == 5
    edit(checkpoint, num_labels=5_000, id2label=None)
    words = loading_fails(MultiExitForImageClassification, checkpoint)
    assert "the largest is backbone.fc.weight, 5000 x 96. Load it with the configuration" in words


# Weights


def test_pickled_weights_are_refused(checkpoint):
    weights = AutoModelForImageClassification.from_pretrained(checkpoint).state_dict()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Weights are read from safetensors only. Do not pass use_safetensors."):
        AutoModelForImageClassification.from_pretrained(checkpoint, use_safetensors=False)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"must hold its weights as model.safetensors, but it has none. Pickled weights"):
        AutoModelForImageClassification.from_pretrained(checkpoint)
    config = MultiExitConfig.from_pretrained(checkpoint)
    with pytest.raises(OSError, match="but it names pytorch_model.bin. Pickled weights"):
        MultiExitForImageClassification.from_pretrained(checkpoint / "pytorch_model.bin", config=config)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../elsewhere.safetensors"])
def test_an_index_names_safetensors_of_its_own_folder_only(checkpoint, name):
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(weights, checkpoint.parent / "elsewhere.safetensors")
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match=f"but it names {name}. Pickled weights"):
        AutoModelForImageClassification.from_pretrained(checkpoint)


def test_an_index_without_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(OSError, match="must hold its weights as model.safetensors, but it has none"):
        AutoModelForImageClassification.from_pretrained(checkpoint)


def test_several_files_of_weights(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path)
    assert same_weights(model, loaded)
    model.save_pretrained(tmp_path / "half", variant="half")
    assert MultiExitForImageClassification.from_pretrained(tmp_path / "half", variant="half").num_exits == 4


@pytest.mark.parametrize("trust", [None, True])
def test_with_the_library_no_code_of_the_repository_runs(checkpoint, trust):
    for path in checkpoint.glob("*.py"):
        path.write_text("raise SystemExit('ran code of the repository')\n")
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint, trust_remote_code=trust)
    assert type(loaded) is MultiExitForImageClassification
