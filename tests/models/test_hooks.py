import copy
import pickle
import threading

import pytest
import torch
from torch.utils import _pytree as pytree

from hf_selfkd.models.dry_run import input_shape
from hf_selfkd.models.hooks import Collector, Visitor, join_features, join_rows, keep_rows, run
from tests.helpers.backbones import build_hooked

# One of each way in which timm gives the output of a stage: arguments that keep it small, and the image.
FAMILIES = {
    "test_resnet": ({}, (64, 96)),  # maps
    "test_mambaout": ({}, (64, 96)),  # channels last
    "test_vit": ({"dynamic_img_size": True}, (64, 96)),  # tokens, their grid as the image
    "test_vit4": ({"img_size": 64}, (64, 64)),  # registers, mean of tokens
    "cait_xxs24_224": ({"img_size": 64, "depth": 3}, (64, 64)),  # class attention after the stages
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


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_hooks_see_the_outputs_of_timm(name):
    kwargs, size = FAMILIES[name]
    backbone, anatomy = build_hooked(name, **kwargs)
    images = torch.randn(2, 3, *size)
    seen = Collector()
    logits = run(backbone, anatomy, images, seen)
    assert anatomy.hooked
    assert torch.equal(logits, backbone(images))
    maps = backbone.forward_intermediates(images, intermediates_only=True)
    assert len(maps) == len(anatomy.stages) > 1
    for index, (stage, expected) in enumerate(zip(anatomy.stages, maps, strict=True)):
        feature_map = stage.to_feature_map(seen.outputs[index], size)
        assert torch.equal(feature_map, expected), index
        assert stage.channels == feature_map.shape[1]
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
@pytest.mark.slow
def test_a_visitor_may_keep_fewer_rows(name, kwargs):
    backbone, anatomy = build_hooked(name, **kwargs)
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


def test_nested_outputs_are_walked_by_the_pytree_of_torch():
    """It is private to torch: lists and tuples must stay what they are, and all other values be leaves."""
    assert pytree.tree_leaves({"a": [1, (2.5, True)], "b": {"c": None}}) == [1, 2.5, True, None]
    assert pytree.tree_map(lambda *leaves: sum(leaves), (1, [2]), (3, [4])) == (4, [6])
    assert pytree.tree_map_only(int, lambda leaf: leaf + 1, [1, (2, None, "grid")]) == [2, (3, None, "grid")]


def test_rows_of_nested_outputs_are_joined():
    first, second = (torch.full((rows, 2), float(rows)) for rows in (1, 2))
    joined, (same, size) = join_rows([[first, (first, [7, 7])], [second, (second, [7, 7])]])
    assert torch.equal(joined, torch.cat([first, second])) and torch.equal(same, joined)
    assert size == [7, 7]


@torch.no_grad()
def test_hooked_backbones_copy_and_pickle():
    backbone, anatomy = build_hooked("test_resnet")
    images = torch.randn(2, 3, 32, 32)
    for copied in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        seen = Collector()
        assert torch.equal(run(copied, anatomy, images, seen), backbone(images))
        assert sorted(seen.outputs) == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_threads_do_not_see_each_other():
    backbone, anatomy = build_hooked("test_resnet")
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
    backbone, anatomy = build_hooked("test_resnet")
    seen = Collector()
    with pytest.raises(RuntimeError):
        run(backbone, anatomy, torch.randn(2, 5, 32, 32), seen)
    backbone(torch.randn(2, 3, 32, 32))
    assert not seen.outputs
