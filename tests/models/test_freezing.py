"""Freezing the backbone or its first stages, and what stays in evaluation with it."""

import pytest
import torch

from hf_selfkd import MultiExitForImageClassification
from hf_selfkd.models.freezing import parameters_of_stages
from tests.helpers.models import SWIN


def statistics(module):
    return [buffer.clone() for name, buffer in module.named_buffers() if "running" in name]


def changed(module, action):
    before = statistics(module)
    action()
    return [not torch.equal(*pair) for pair in zip(before, statistics(module), strict=True)]


@pytest.mark.parametrize("unfreeze", ["requires_grad_", "unfreeze_backbone"])
def test_an_unfrozen_backbone_trains_with_its_statistics(build, batch, unfreeze):
    model = build()
    model.freeze_backbone()
    assert not any(changed(model.backbone, lambda: model.train()(batch["pixel_values"])))
    model.requires_grad_(True) if unfreeze == "requires_grad_" else model.unfreeze_backbone()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(changed(model.backbone, lambda: model.train()(batch["pixel_values"])))


def test_an_unfrozen_backbone_is_in_the_mode_of_the_model(build):
    model = build().train()
    model.freeze_backbone()
    assert not model.backbone.training
    model.unfreeze_backbone()
    assert model.backbone.training


def test_the_first_stages_are_frozen_alone(build, batch):
    model = build()
    model.freeze_backbone(3)
    model.train()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    names = [name for name, _ in model.named_parameters()]
    assert frozen == [
        name
        for name in names
        if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1", "backbone.layer2"))
    ]
    for name in ("conv1", "bn1", "layer1", "layer2"):
        assert not any(changed(getattr(model.backbone, name), lambda: model(batch["pixel_values"])))
    assert any(changed(model.backbone.layer3, lambda: model(batch["pixel_values"])))


@pytest.mark.parametrize(
    ("backbone", "kwargs", "first", "then"),
    [
        (
            "test_vit",
            {"img_size": 32, "patch_size": 8},
            {"cls_token", "pos_embed", "patch_embed", "blocks.0"},
            "blocks.1",
        ),
        ("swin_tiny_patch4_window7_224", SWIN, {"patch_embed", "layers.0"}, "layers.1"),
        ("test_convnext", {}, {"stem", "stages.0"}, "stages.1"),
    ],
)
def test_stems_and_embeddings_belong_to_the_first_stage(backbone, kwargs, first, then):
    model = MultiExitForImageClassification.from_backbone(backbone, num_labels=5, backbone_kwargs=kwargs)
    names = [name for name, _ in model.backbone.named_parameters()]
    found = parameters_of_stages(model.backbone, model.anatomy, 1)
    assert found == [name for name in names if name.startswith(tuple(f"{part}" for part in first))]
    longer = parameters_of_stages(model.backbone, model.anatomy, 2)
    assert {name for name in longer if name not in found} == {name for name in names if name.startswith(f"{then}.")}


@pytest.mark.parametrize("num_stages", [0, 6])
def test_stages_that_do_not_exist_are_refused(build, num_stages):
    with pytest.raises(ValueError, match=f"num_stages must be from 1 to 5, .* but got {num_stages}"):
        build().freeze_backbone(num_stages)
