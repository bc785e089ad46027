import gc
import json
import os
import tempfile
from pathlib import Path

# Read while huggingface_hub and torch are imported, here and in the subprocesses of the tests: no network, no file in
# the user's cache, one thread in each of the processes that run side by side.
_HF_HOME = tempfile.TemporaryDirectory(prefix="hf_home_")
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HOME=_HF_HOME.name, OMP_NUM_THREADS="1")
for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
    os.environ.pop(name, None)  # would take precedence over HF_HOME, or sign in
# Workers of pytest-xdist inherit it: listing the fonts takes matplotlib seconds.
os.environ.setdefault("MPLCONFIGDIR", os.path.join(_HF_HOME.name, "matplotlib"))
os.environ["XDG_CACHE_HOME"] = os.path.join(_HF_HOME.name, "cache")  # onnxruntime writes an identifier there

import pytest
import torch
from transformers import TrainingArguments

from hf_selfkd import (
    MultiExitForImageClassification,
    MultiExitForSemanticSegmentation,
    MultiExitOutput,
    SelfDistillationTrainer,
)
from tests.helpers.hub_server import HubServer, connect
from tests.helpers.models import build_copy
from tests.helpers.recipe import PLAIN_SGD

collect_ignore = ["helpers/load_without_library.py"]  # a script, which the search for doctests would run

_VECTORS = {
    entry["id"]: entry for entry in json.loads((Path(__file__).parent / "vectors.json").read_text())["vectors"]
}


# Files of many seconds. They run first: one that started last would run alone.
_LONG = (
    *("tests/examples/", "tests/methods/test_contract.py", "tests/test_readme.py"),
    *("tests/training/test_sharding.py", "tests/training/test_trainer.py"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))


def pytest_collection_finish():
    # Every training ends with a garbage collection, which takes longer than its steps if it goes through all that the
    # imports have made.
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _garbage_of_earlier_modules():
    gc.freeze()  # likewise: a compiler leaves hundreds of thousands of objects


def pytest_unconfigure():
    _HF_HOME.cleanup()  # workers of pytest-xdist end without finalizers


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def vector():
    """Look up an entry of vectors.json by its id; numbers become tensors."""

    def look_up(name):
        entry = _VECTORS[name]
        return {key: _as_tensors(value) for key, value in entry["inputs"].items()}, _as_tensors(entry["expected"])

    return look_up


def _as_tensors(value):
    if isinstance(value, dict):
        return {key: _as_tensors(item) for key, item in value.items()}
    if isinstance(value, (bool, str)) or value is None:
        return value
    try:
        return torch.tensor(value)
    except ValueError:  # levels of several sizes
        return [_as_tensors(item) for item in value]


@pytest.fixture
def exits_of_vectors(vector):
    """Return the four exits that the vectors share, as a model's output, and the labels."""
    inputs, _ = vector("common.ce_per_exit")
    output = MultiExitOutput(
        exit_logits=tuple(inputs["exit_logits_shallow_to_deep"].unbind()),
        exit_features=tuple(inputs["exit_features_shallow_to_deep"].unbind()),
    )
    output.logits = output.exit_logits[-1]
    return output, inputs["labels"]


@pytest.fixture
def build():
    """Return a function that gives a small multi-exit model with five classes for 32-pixel images, seeded with 0."""

    def build(backbone="test_resnet", **config):
        if backbone in ("test_resnet", "test_efficientnet"):
            config.setdefault("small_input_stem", True)
        if backbone.startswith("test_vit"):
            config.setdefault("backbone_kwargs", {"img_size": 32, "patch_size": 8})
        config.setdefault("num_labels", 5)
        return build_copy(MultiExitForImageClassification, backbone, **config)

    return build


@pytest.fixture
def build_segmenter():
    """Return a function that gives a small segmentation model with five classes, in training mode, seeded with 0."""

    def build_segmenter(backbone="test_resnet", **config):
        config = {"num_labels": 5, "pyramid_width": 8} | config
        return build_copy(MultiExitForSemanticSegmentation, backbone, **config).train()

    return build_segmenter


@pytest.fixture
def images():
    """Return twenty labelled images of 32 pixels, of five classes that differ."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=generator) + index % 5 - 2, "labels": index % 5}
        for index in range(20)
    ]


@pytest.fixture
def batch(images):
    """Return eight of the images as a batch."""
    return {
        "pixel_values": torch.stack([image["pixel_values"] for image in images[:8]]),
        "labels": torch.tensor([image["labels"] for image in images[:8]]),
    }


@pytest.fixture
def train(tmp_path, images):
    """Train for a few steps on the CPU and return the trainer."""

    def train(model, method="byot", *, resume=None, trainer_kwargs=None, **args):
        args = {
            **PLAIN_SGD,
            "output_dir": str(tmp_path / "run"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": 5,
            "learning_rate": 0.01,
            "seed": 0,
        } | args
        kwargs = {"train_dataset": images, "eval_dataset": images} | (trainer_kwargs or {})
        trainer = SelfDistillationTrainer(model, TrainingArguments(**args), method, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Run a stand-in for the Hub that huggingface_hub in this process asks, signed in as ada, with an empty cache."""
    with HubServer() as server:
        connect(monkeypatch, server, tmp_path / "hub_cache")
        yield server
