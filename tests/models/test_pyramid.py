import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from hf_selfkd.models.pyramid import BiFPN, fuse, resize

FACTS = json.loads((Path(__file__).parents[1] / "vectors.json").read_text())["structure_facts"]["frskd"]
RESNET18 = [64, 128, 256, 512]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def pyramid(channels, sizes, batch=2):
    return [torch.randn(batch, width, *size) for width, size in zip(channels, sizes, strict=True)]


# Sizes


@pytest.mark.parametrize("multiplier", [1, 2, 4])
def test_parameters_are_those_of_the_authors(multiplier):
    widths = [multiplier * width for width in RESNET18]
    assert count(BiFPN(widths, RESNET18)) + count(nn.Linear(widths[-1], 100)) == FACTS[f"BiFPNc_w{multiplier}"]


@pytest.mark.parametrize("width", [64, 128, 256])
def test_parameters_of_constant_width_are_those_of_the_authors(width):
    assert count(BiFPN([width] * 4, RESNET18)) + count(nn.Linear(width, 100)) == FACTS[f"BiFPN_ch{width}"]


def test_parameters_for_wide_resnet_are_those_of_the_authors():
    assert count(BiFPN([64, 128, 256], [32, 64, 128])) + count(nn.Linear(256, 100)) == FACTS["BiFPNc_w2_wrn16x2"]


def test_parameter_groups_are_those_of_the_authors():
    layer = BiFPN([2 * width for width in RESNET18], RESNET18)
    assert {
        "lat_conv": count(layer.down_laterals),
        "lat_conv2": count(layer.up_laterals),
        "up_conv": sum(count(node.refine) for node in layer.down_nodes),
        "down_conv": sum(count(node.refine) for node in layer.up_nodes),
        "up_sample": sum(count(node.project) for node in layer.down_nodes),
        "down_sample": sum(count(node.project) for node in layer.up_nodes),
    } == FACTS["param_groups"]
    assert [list(node.fusion_weight.shape) for node in layer.down_nodes] == FACTS["fusion_sizes"]["up"]
    assert [list(node.fusion_weight.shape) for node in layer.up_nodes] == FACTS["fusion_sizes"]["down"]


def test_shapes_are_those_of_the_authors():
    layer = BiFPN([2 * width for width in RESNET18], RESNET18)
    maps = [torch.randn(shape) for shape in FACTS["feat_shapes"]]
    assert [list(level.shape) for level in layer(maps)] == FACTS["bi_shapes"]


# Blocks


def test_fusion_of_the_vectors(vector):
    inputs, expected = vector("frskd.fast_fusion")
    one_hot = list(torch.eye(3).unbind())
    assert_close(fuse(one_hot, inputs["raw"]), expected["normalised"], atol=1e-5, rtol=0)
    assert_close(fuse(one_hot, torch.ones(3)), expected["init_three"], atol=1e-5, rtol=0)
    assert_close(fuse(list(torch.eye(2).unbind()), torch.ones(2)), expected["init_two"], atol=1e-5, rtol=0)


def test_negative_fusion_weights_leave_their_maps_out():
    maps = [torch.ones(1), torch.full((1,), float("inf"))]
    assert_close(fuse(maps[:1] * 2, torch.tensor([-1.0, 3.0])), torch.ones(1))
    assert_close(fuse(maps[:1], torch.tensor([-1.0])), torch.zeros(1))


def test_halving_of_the_vectors(vector):
    inputs, expected = vector("frskd.same_pool")
    level = inputs["map_4x4_row_major"].float().reshape(1, 1, 4, 4)
    assert_close(resize(level, (2, 2))[0, 0], expected["pooled"].float())


@pytest.mark.parametrize("size", [(2, 2), (4, 7), (7, 5), (8, 3), (9, 6), (1, 2)])
def test_halving_pads_with_zeros_at_bottom_and_right_first(size):
    level = torch.rand(2, 3, *size)
    padding = []
    for side in reversed(size):
        total = 2 * ((side + 1) // 2 - 1) + 3 - side
        padding += [total // 2, total - total // 2]
    expected = F.max_pool2d(F.pad(level, padding), 3, stride=2)
    assert_close(resize(level, [(side + 1) // 2 for side in size]), expected)


@pytest.mark.parametrize(
    ("size", "target"), [((4, 4), (8, 8)), ((4, 4), (7, 7)), ((8, 8), (3, 3)), ((8, 4), (4, 8)), ((4, 4), (4, 4))]
)
def test_any_step_takes_values_of_the_map(size, target):
    level = torch.rand(2, 3, *size)
    resized = resize(level, target)
    assert resized.shape == (2, 3, *target)
    assert torch.isin(resized, level).all()
    assert_close(resized.amax(dim=(2, 3)), level.amax(dim=(2, 3)))


def test_doubling_repeats():
    level = torch.rand(1, 2, 3, 3)
    assert_close(resize(level, (6, 6)), level.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


# Layers


def authors_order(layer, maps):
    """Apply the paper's equations one by one, every ReLU where the paper has it, four levels."""

    def pool(level):
        return F.max_pool2d(F.pad(level, (0, 1, 0, 1)), 3, stride=2)

    def node(block, own, neighbour):
        weights = block.fusion_weight.relu()
        weights = weights / (weights.sum() + 1e-6)
        fused = sum(weight * F.relu(level) for weight, level in zip(weights, [*own, neighbour], strict=True))
        return block.refine[:-1](fused)  # no ReLU at the end

    down = [lateral(F.relu(level)) for lateral, level in zip(layer.down_laterals, maps, strict=True)]
    up = [None] + [lateral(F.relu(level)) for lateral, level in zip(layer.up_laterals, maps[1:], strict=True)]
    p = {3: down[3]}
    for i in (2, 1, 0):
        larger = F.interpolate(F.relu(p[i + 1]), scale_factor=2)
        p[i] = node(layer.down_nodes[i], [down[i]], layer.down_nodes[i].project(larger))
    t = {0: p[0]}
    for i in (1, 2):
        t[i] = node(layer.up_nodes[i - 1], [up[i], p[i]], layer.up_nodes[i - 1].project(pool(F.relu(t[i - 1]))))
    t[3] = node(layer.up_nodes[2], [up[3]], layer.up_nodes[2].project(pool(F.relu(t[2]))))
    return [F.relu(t[i]) for i in range(4)]


@pytest.mark.parametrize("training", [True, False])
def test_layer_equals_the_equations(training):
    layer = BiFPN([8, 16, 24, 32], [4, 8, 12, 16]).double().train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.2, 1)
    maps = [level.double().relu() for level in pyramid([4, 8, 12, 16], [(16, 8), (8, 4), (4, 2), (2, 1)])]
    for level, expected in zip(layer(maps), authors_order(layer, maps), strict=True):
        assert_close(level, expected)


@pytest.mark.parametrize(
    "sizes",
    [
        [(28, 28), (14, 14), (7, 7), (4, 4)],
        [(30, 17), (15, 9), (5, 3), (5, 3)],
        [(4, 4)] * 4,
        [(8, 8), (1, 1), (4, 4), (2, 2)],
    ],
    ids=["halves rounded up", "uneven", "isotropic", "not in order"],
)
@pytest.mark.parametrize("widths", [[6, 12, 12, 24], [8] * 4], ids=["growing", "constant"])
def test_any_sizes_and_every_parameter_learns(sizes, widths):
    channels = [3, 6, 6, 12]
    layer = BiFPN(widths, channels)
    maps = [level.requires_grad_() for level in pyramid(channels, sizes)]
    refined = layer(maps)
    assert [level.shape for level in refined] == [(2, width, *size) for width, size in zip(widths, sizes, strict=True)]
    assert all((level >= 0).all() for level in refined)
    refined[-1].square().sum().backward()  # the last level alone, as under the classifier of the self-teacher
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(level.grad.abs().sum() > 0 for level in maps)


def test_stack_needs_no_laterals():
    stack = nn.Sequential(BiFPN([8] * 3, [3, 4, 5]), BiFPN([8] * 3), BiFPN([8] * 3))
    refined = stack(pyramid([3, 4, 5], [(8, 8), (4, 4), (2, 2)]))
    assert [level.shape for level in refined] == [(2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 2, 2)]
    assert count(stack[1].down_laterals) == count(stack[1].up_laterals) == 0
    assert count(stack[1]) == 4 * 2 * (8 * 8 + 11 * 8) + 2 + 2 + 3 + 2


def test_signed_maps_keep_both_halves():
    layer = BiFPN([4, 4], [2, 2]).eval()
    maps = pyramid([2, 2], [(4, 4), (2, 2)])
    for level, other in zip(layer(maps), layer([level.relu() for level in maps]), strict=True):
        assert not torch.equal(level, other)


def test_one_level():
    layer = BiFPN([4], [2])
    (level,) = layer([torch.randn(2, 2, 3, 3)])
    assert level.shape == (2, 4, 3, 3)


def test_wrong_number_of_maps():
    with pytest.raises(ValueError, match="zip"):
        BiFPN([4, 4], [2, 2])(pyramid([2], [(4, 4)]))
