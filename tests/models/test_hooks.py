import copy
import pickle
import random
import threading

import numpy as np
import pytest
import timm
import torch
from torch import nn

from hf_selfkd import MultiExitForImageClassification
from hf_selfkd.models.dry_run import input_shape, measure
from hf_selfkd.models.hooks import Collector, Visitor, attach_hooks, join_features, join_rows, keep_rows, run
from hf_selfkd.models.stages import Stage, default_exits
from hf_selfkd.models.timm_factory import create_backbone

# One of each way in which timm gives the output of a stage: arguments that keep it small, and the image.
FAMILIES = {
    "test_resnet": ({}, (64, 96)),  # maps
    "test_mambaout": ({}, (64, 96)),  # channels last
    "test_vit": ({"dynamic_img_size": True}, (64, 96)),  # tokens, their grid as the image
    "test_vit4": ({"img_size": 64}, (64, 64)),  # registers, mean of tokens
    "cait_xxs24_224": ({"img_size": 64, "depth": 3}, (64, 64)),  # class attention behind the stages
    "coat_tiny": (  # lists of blocks, three maps from one module
        {"img_size": 64, "embed_dims": [16, 32, 32, 32], "serial_depths": [1] * 4, "parallel_depth": 1},
        (64, 64),
    ),
    "crossvit_tiny_240": ({"depth": ((1, 1, 0),) * 2}, (240, 240)),  # lists, two classifiers of two widths
    "deit_tiny_distilled_patch16_224": ({"img_size": 64, "depth": 3}, (64, 64)),  # two heads
    "efficientvim_m1_dist": ({}, (64, 96)),  # tuples, two lists of classifiers
    "gemma4_vit_167m": (  # cannot run forward_intermediates on the meta device
        {"depth": 2, "embed_dim": 32, "num_heads": 1, "head_dim": 32, "intermediate_size": 32},
        (64, 96),
    ),
    "hrnet_w18_small": ({}, (64, 96)),  # feature_info names modules that do not exist
    "mvitv2_tiny": ({"img_size": 64}, (64, 64)),  # tuples of map and size
    "pit_ti_224": ({"img_size": 64}, (64, 64)),  # tuples of map and class token
    "resnet50_clip": ({"img_size": 64}, (64, 64)),  # attention pooling, whose classifier sees all tokens
    "samvit_base_patch16": (  # channels last, a classifier that brings its pooling
        {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 2, "global_attn_indexes": (1,)},
        (64, 64),
    ),
    "tnt_s_legacy_patch16_224": ({"img_size": 64, "depth": 2}, (64, 64)),
    "vit_base_patch16_siglip_224": ({"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, (64, 64)),
}


def build(name, **kwargs):
    def create():
        return create_backbone(name, num_classes=5, small_input_stem=False, exit_width=None, **kwargs)

    backbone = create().eval()
    anatomy = measure(create)
    attach_hooks(backbone, anatomy)
    return backbone, anatomy


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_hooks_see_what_timm_gives(name):
    kwargs, size = FAMILIES[name]
    backbone, anatomy = build(name, **kwargs)
    images = torch.randn(2, 3, *size)
    seen = Collector()
    logits = run(backbone, anatomy, images, seen)
    assert anatomy.hooked
    assert torch.equal(logits, backbone(images))
    maps = backbone.forward_intermediates(images, intermediates_only=True)
    assert len(maps) == len(anatomy.stages) > 1
    for index, (stage, expected) in enumerate(zip(anatomy.stages, maps, strict=True)):
        stage_map = stage.to_map(seen.outputs[index], size)
        assert torch.equal(stage_map, expected), index
        assert stage.channels == stage_map.shape[1]
    pre_logits = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    features = join_features(seen.features)
    assert torch.equal(features, pre_logits.flatten(1))
    assert features.shape == (2, anatomy.width)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {}),
        ("mvitv2_tiny", {"img_size": 64}),
        ("tnt_s_legacy_patch16_224", {"img_size": 64, "depth": 2}),
        ("crossvit_tiny_240", {"depth": ((1, 1, 0),) * 2}),
    ],
)
@torch.no_grad()
def test_a_visitor_may_keep_fewer_rows(name, kwargs):
    backbone, anatomy = build(name, **kwargs)
    images = torch.randn(3, *input_shape(backbone))
    rows = torch.tensor([0, 2])
    full = backbone(images)
    assert not torch.allclose(full[0], full[1], atol=1e-4)
    for chosen in range(len(anatomy.stages)):

        class Chosen(Visitor):
            def on_stage(self, index, output, chosen=chosen):
                return keep_rows(output, rows, 3) if index == chosen else None

        few = run(backbone, anatomy, images, Chosen())
        torch.testing.assert_close(few, full[rows], atol=1e-5, rtol=1e-4)


def test_rows_of_nested_outputs_are_kept():
    per_image = torch.arange(3.0).view(3, 1)
    per_patch = torch.arange(6.0).view(6, 1)  # two patches for each image
    kept, (patches, size) = keep_rows([per_image, (per_patch, [7, 7])], torch.tensor([0, 2]), 3)
    assert kept.flatten().tolist() == [0, 2]
    assert patches.flatten().tolist() == [0, 1, 4, 5]
    assert size == [7, 7]


def test_rows_of_nested_outputs_are_joined():
    first, second = (torch.full((rows, 2), float(rows)) for rows in (1, 2))
    joined, (same, size) = join_rows([[first, (first, [7, 7])], [second, (second, [7, 7])]])
    assert torch.equal(joined, torch.cat([first, second])) and torch.equal(same, joined)
    assert size == [7, 7]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1, 1)}),
        ("test_resnet", {"img_size": None}),
    ],
)
def test_layouts_are_told_where_channels_height_and_width_agree(name, kwargs, monkeypatch):
    if name == "test_resnet":  # its second stage has 32 channels
        monkeypatch.setattr("hf_selfkd.models.dry_run.input_shape", lambda backbone: (3, 128, 128))
    backbone, anatomy = build(name, **kwargs)
    assert any((stage.channels, stage.channels) == stage.size for stage in anatomy.stages)
    assert {stage.layout for stage in anatomy.stages} == {"NHWC" if name.startswith("swin") else "NCHW"}


class Misnamed(nn.Module):
    """A network whose feature_info names no module, as one that somebody registers with timm may."""

    def __init__(self, layout="NCHW", num_classes=5):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 4, stride=4), nn.Conv2d(16, 16, 1)
        self.layout, self.num_classes = layout, num_classes
        self.fc = nn.Linear(16, num_classes)
        self.feature_info = [{"module": "stem"}, {"module": "body"}]
        self.pretrained_cfg = {"input_size": (3, 64, 64)}

    def get_classifier(self):
        return self.fc

    def forward_intermediates(self, x, intermediates_only=False):
        maps = [self.conv1(x)]
        maps.append(self.conv2(maps[0]))
        return maps if intermediates_only else (maps[-1], maps)

    def forward_head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_intermediates(x)[0])


@torch.no_grad()
def test_timm_gives_the_maps_where_hooks_cannot():
    backbone = Misnamed().eval()
    anatomy = measure(Misnamed)
    assert not anatomy.hooked
    assert [stage.size for stage in anatomy.stages] == [(16, 16), (16, 16)]
    attach_hooks(backbone, anatomy)
    images, seen = torch.randn(2, 3, 32, 64), Collector()
    assert torch.equal(run(backbone, anatomy, images, seen), backbone(images))
    for index, expected in enumerate(backbone.forward_intermediates(images, intermediates_only=True)):
        assert torch.equal(anatomy.stages[index].to_map(seen.outputs[index], (32, 64)), expected)


@torch.no_grad()
def test_tokens_that_do_not_lie_in_rows_are_left_to_timm():
    backbone, anatomy = build("hiera_tiny_224", embed_dim=24, stages=(1, 1, 1, 1))
    images, seen = torch.randn(2, 3, 224, 224), Collector()
    logits = run(backbone, anatomy, images, seen)
    assert not anatomy.hooked
    assert torch.equal(logits, backbone(images))
    for index, expected in enumerate(backbone.forward_intermediates(images, intermediates_only=True)):
        assert torch.equal(anatomy.stages[index].to_map(seen.outputs[index], (224, 224)), expected)


def test_a_layout_that_nothing_tells_is_left_to_timm():
    def create():
        backbone = Misnamed()
        backbone.feature_info = [{"module": "conv1"}, {"module": "conv2"}]
        return backbone

    assert not measure(create).hooked  # 16 channels, 16 x 16


def test_stages_that_end_out_of_order_are_known():
    assert not build("crossvit_tiny_240", depth=((1, 1, 0),) * 2)[1].in_order
    assert build("test_vit")[1].in_order


def test_logits_must_be_one_row_per_image():
    with pytest.raises(ValueError, match=r"must answer with logits \(batch, 5\).*VisionTransformer gives.*101, 5"):
        build("test_vit", global_pool="")


def test_a_backbone_that_cannot_run_says_so():
    def create():
        return create_backbone("levit_128s", num_classes=5, small_input_stem=True, exit_width=None)

    with pytest.raises(ValueError, match=r"LevitDistilled cannot run on images shaped \(3, 224, 224\).*leave that at"):
        measure(create)


def test_image_shape_follows_the_arguments():
    assert input_shape(build("test_vit", img_size=(64, 32), in_chans=4)[0]) == (4, 64, 32)
    assert input_shape(build("test_vit", img_size=32, in_chans=1)[0]) == (1, 32, 32)
    assert input_shape(build("test_vit")[0]) == (3, 160, 160)


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
    backbone, anatomy = build(name, **kwargs)
    images, seen = torch.randn(1, 3, *size), Collector()
    run(backbone, anatomy, images, seen)
    for index, expected in enumerate(backbone.forward_intermediates(images, intermediates_only=True)):
        assert torch.equal(anatomy.stages[index].to_map(seen.outputs[index], size), expected)


def test_tokens_that_are_no_grid():
    stage = Stage("", 8, (4, 4), (64, 64), layout="NLC", num_prefix_tokens=1)
    assert stage.to_map(torch.zeros(2, 1 + 2 * 6, 8), (32, 96)).shape == (2, 8, 2, 6)
    with pytest.raises(ValueError, match=r"gave 11 tokens for images of 32x96 pixels, which are no grid of 2x6\. Use"):
        stage.to_map(torch.zeros(2, 12, 8), (32, 96))


def stages(*sizes):
    return tuple(Stage("", 8, (size, size), (64, 64)) for size in sizes)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((32, 16, 8, 4, 2), [1, 2, 3]),  # ResNet
        ((16, 8, 4, 2), [0, 1, 2]),  # ConvNeXt, Swin
        ((32, 16, 16, 8, 8), [0, 2]),  # the last of each resolution
        ((14,) * 12, [2, 5, 8]),  # ViT
        ((14,) * 6, [1, 2, 3]),
        ((14,) * 2, [0]),
        ((14,), []),
    ],
)
def test_default_exits(sizes, expected):
    assert default_exits(stages(*sizes)) == expected


def test_measuring_leaves_random_states_and_devices_alone():
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    measure(lambda: timm.create_model("test_vit"))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert torch.empty(1).device.type == "cpu"
    assert all(tensor.device.type == "cpu" for tensor in timm.create_model("test_vit").state_dict().values())


@torch.no_grad()
def test_hooked_backbones_copy_and_pickle():
    backbone, anatomy = build("test_resnet")
    images = torch.randn(2, 3, 32, 32)
    for copied in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        seen = Collector()
        assert torch.equal(run(copied, anatomy, images, seen), backbone(images))
        assert sorted(seen.outputs) == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_threads_do_not_see_each_other():
    backbone, anatomy = build("test_resnet")
    batches = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    visitors = [Collector() for _ in batches]
    barrier = threading.Barrier(len(batches))

    def work(batch, visitor):
        barrier.wait()
        run(backbone, anatomy, batch, visitor)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, visitors, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, visitor in zip(batches, visitors, strict=True):
        maps = backbone.forward_intermediates(batch, intermediates_only=True)
        assert all(torch.equal(visitor.outputs[index], expected) for index, expected in enumerate(maps))


@torch.no_grad()
def test_a_visitor_is_forgotten_when_the_network_fails():
    backbone, anatomy = build("test_resnet")
    seen = Collector()
    with pytest.raises(RuntimeError):
        run(backbone, anatomy, torch.randn(2, 5, 32, 32), seen)
    backbone(torch.randn(2, 3, 32, 32))
    assert not seen.outputs
