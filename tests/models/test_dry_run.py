import copy
import random

import numpy as np
import pytest
import timm
import torch

from hf_selfkd import MultiExitForImageClassification
from hf_selfkd.models.dry_run import input_shape, measure
from hf_selfkd.models.hooks import Collector, run
from hf_selfkd.models.timm_factory import create_backbone
from hf_selfkd.models.timm_quirks import copy_to_meta
from tests.helpers.backbones import Misnamed, build_hooked, hooked


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1, 1)}),
        ("test_resnet", {"img_size": None}),
    ],
)
def test_layouts_are_found_where_channels_height_and_width_agree(name, kwargs, monkeypatch):
    if name == "test_resnet":  # its second stage has 32 channels
        monkeypatch.setattr("hf_selfkd.models.dry_run.input_shape", lambda backbone: (3, 128, 128))
    backbone, anatomy = build_hooked(name, **kwargs)
    assert any((stage.channels, stage.channels) == stage.size for stage in anatomy.stages)
    assert {stage.layout for stage in anatomy.stages} == {"NHWC" if name.startswith("swin") else "NCHW"}


@torch.no_grad()
def test_timm_returns_the_feature_maps_where_hooks_cannot():
    backbone, anatomy = hooked(Misnamed())
    assert not anatomy.hooked
    assert [stage.size for stage in anatomy.stages] == [(16, 16), (16, 16)]
    images, seen = torch.randn(2, 3, 32, 64), Collector()
    assert torch.equal(run(backbone, anatomy, images, seen), backbone(images))
    for index, expected in enumerate(backbone.forward_intermediates(images, intermediates_only=True)):
        assert torch.equal(anatomy.stages[index].to_feature_map(seen.outputs[index], (32, 64)), expected)


@torch.no_grad()
def test_tokens_that_do_not_lie_in_rows_are_left_to_timm():
    backbone, anatomy = build_hooked("hiera_tiny_224", embed_dim=24, stages=(1, 1, 1, 1))
    images, seen = torch.randn(2, 3, 224, 224), Collector()
    logits = run(backbone, anatomy, images, seen)
    assert not anatomy.hooked
    assert torch.equal(logits, backbone(images))
    for index, expected in enumerate(backbone.forward_intermediates(images, intermediates_only=True)):
        assert torch.equal(anatomy.stages[index].to_feature_map(seen.outputs[index], (224, 224)), expected)


def test_an_undecided_layout_is_left_to_timm():
    backbone = Misnamed()
    backbone.feature_info = [{"module": "conv1"}, {"module": "conv2"}]
    assert not measure(backbone).hooked  # 16 channels, 16 x 16


def test_stages_that_end_out_of_order_are_known():
    assert not build_hooked("crossvit_tiny_240", depth=((1, 1, 0),) * 2)[1].in_order
    assert build_hooked("test_vit")[1].in_order


def test_logits_must_be_one_row_per_image():
    with pytest.raises(ValueError, match=r"must return the logits \(batch, 5\).*VisionTransformer returns.*101, 5"):
        build_hooked("test_vit", global_pool="")


def test_a_backbone_that_cannot_run_says_so():
    backbone = create_backbone("levit_128s", num_classes=5, small_input_stem=True, exit_width=None)
    with pytest.raises(ValueError, match=r"LevitDistilled cannot run on images of shape \(3, 224, 224\).*leave it at"):
        measure(backbone)


def test_image_shape_follows_the_arguments():
    assert input_shape(build_hooked("test_vit", img_size=(64, 32), in_chans=4)[0]) == (4, 64, 32)
    assert input_shape(build_hooked("test_vit", img_size=32, in_chans=1)[0]) == (1, 32, 32)
    assert input_shape(build_hooked("test_vit")[0]) == (3, 160, 160)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_images_of_other_channels(name, channels):
    model = MultiExitForImageClassification.from_backbone(
        name, num_labels=5, backbone_kwargs={"in_chans": channels}
    ).eval()
    images = torch.randn(2, channels, 160, 160)
    with torch.no_grad():
        assert torch.equal(model(images).logits, model.backbone(images))


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (160, 160), (448, 448)])
@torch.no_grad()
def test_images_of_other_sizes(size):
    model = MultiExitForImageClassification.from_backbone(
        "test_vit", num_labels=5, backbone_kwargs={"dynamic_img_size": True}
    ).eval()
    images = torch.randn(2, 3, *size)
    maps = model(images, output_hidden_states=True).exit_maps
    expected = model.backbone.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("twins_svt_small", {}, (75, 97)),  # crops
        ("test_vit", {"dynamic_img_size": True, "dynamic_img_pad": True}, (75, 90)),
        ("crossvit_tiny_240", {"depth": ((1, 1, 0),) * 2}, (120, 480)),  # resizes to 240 x 240
    ],
)
@torch.no_grad()
def test_grids_of_tokens_follow_the_backbone(name, kwargs, size):
    backbone, anatomy = build_hooked(name, **kwargs)
    images, seen = torch.randn(1, 3, *size), Collector()
    run(backbone, anatomy, images, seen)
    for index, expected in enumerate(backbone.forward_intermediates(images, intermediates_only=True)):
        assert torch.equal(anatomy.stages[index].to_feature_map(seen.outputs[index], size), expected)


@pytest.mark.parametrize("name", ["test_vit", "levit_128s"])
def test_measuring_leaves_the_backbone_random_states_and_devices_alone(name):
    backbone = timm.create_model(name)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in backbone.named_modules()}
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    measure(backbone)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert torch.empty(1).device.type == "cpu"
    assert backbone.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
    assert {path: set(vars(module)) for path, module in backbone.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


def test_half_precision_is_measured_like_single_precision():
    backbone = timm.create_model("test_vit", num_classes=5)
    assert measure(copy.deepcopy(backbone).bfloat16()) == measure(backbone)


def test_a_copy_on_the_meta_device_holds_no_values():
    backbone = timm.create_model("levit_128s", num_classes=5).eval()
    with torch.no_grad():
        backbone(torch.randn(1, 3, 224, 224))  # caches attention biases in plain attributes
    twin = copy_to_meta(backbone)
    shapes = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in [*twin.parameters(), *twin.buffers()])
    assert twin(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 5)
