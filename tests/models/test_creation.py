"""A model is built once on its device, after one build on the meta device where its size must be known first."""

import pytest
import timm
import torch

from hf_selfkd import (
    MultiExitConfig,
    MultiExitForImageClassification,
    MultiExitForSemanticSegmentation,
    exit_costs,
)
from hf_selfkd.evaluation.costs import exit_parameters


@pytest.fixture
def built(monkeypatch):
    """List the device of every timm model that is built."""
    devices, create_model = [], timm.create_model

    def counted(*args, **kwargs):
        model = create_model(*args, **kwargs)
        devices.append(next(model.parameters()).device.type)
        return model

    monkeypatch.setattr(timm, "create_model", counted)
    return devices


MODELS = {
    MultiExitForImageClassification: {"num_labels": 5},
    MultiExitForSemanticSegmentation: {"num_labels": 5, "pyramid_width": 8},
}


@pytest.mark.parametrize("model_class", MODELS)
def test_a_model_is_built_once(built, model_class, tmp_path):
    model_class(MultiExitConfig(backbone="test_resnet", **MODELS[model_class]))
    assert built == ["meta", "cpu"]  # refused before memory is taken, then built
    built.clear()
    model = model_class.from_backbone("test_resnet", **MODELS[model_class])
    assert built == ["cpu"]
    model.save_pretrained(tmp_path)
    built.clear()
    model_class.from_pretrained(tmp_path)
    assert built == ["meta"]


def test_costs_build_one_twin_on_the_meta_device(built):
    model = MultiExitForImageClassification.from_backbone("test_resnet", num_labels=5)
    built.clear()
    exit_costs(model)
    assert built == ["meta"]
    exit_parameters(model)
    assert built == ["meta", "meta"]


def test_a_saved_card_builds_no_more_than_its_costs(built, build, train):
    trainer = train(build())
    built.clear()
    trainer.save_model()
    assert len(built) <= 2 and set(built) <= {"meta"}  # multiply-adds, parameters


@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [
        ("test_resnet", {}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1)}),
        ("crossvit_tiny_240", {"depth": ((1, 1, 0),) * 2}),
    ],
)
@pytest.mark.slow
def test_all_ways_to_a_model_measure_alike(backbone, kwargs):
    options = {"num_labels": 5, "backbone_kwargs": kwargs}
    with torch.device("meta"):
        config = MultiExitForImageClassification.from_backbone(backbone, **options).config
        expected = MultiExitForImageClassification(config).anatomy
    assert MultiExitForImageClassification(config).anatomy == expected
    assert MultiExitForImageClassification.from_backbone(backbone, **options).anatomy == expected
