import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from hf_selfkd import MultiExitForImageClassification
from hf_selfkd.models.heads import ConvExit, TokenExit

FACTS = json.loads((Path(__file__).parents[1] / "vectors.json").read_text())["structure_facts"]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_the_published_bottlenecks():
    model = MultiExitForImageClassification.from_backbone("resnet18", num_labels=100, small_input_stem=True)
    published = FACTS["byot_unofficial_r18"]
    assert [count(head) for head in model.exits] == [published[f"branch{branch}"] for branch in (1, 2, 3)]


def test_a_wide_backbone_gets_no_wider_bottleneck():
    model = MultiExitForImageClassification.from_backbone("resnet50", num_labels=10, backbone_kwargs={})
    assert [head.bottleneck[0].out_channels for head in model.exits] == [128, 128, 128]
    assert [head.bottleneck[3].kernel_size for head in model.exits] == [(8, 8), (4, 4), (2, 2)]
    assert all(head.classifier.in_features == 2048 for head in model.exits)


def test_conv_exit_by_hand():
    head = ConvExit(channels=3, width=8, num_labels=4, stride=2).eval()
    feature_map = torch.randn(2, 3, 6, 4)
    conv1, norm1, _, conv2, norm2, _, conv3, norm3, _ = head.bottleneck
    hidden = norm1(torch.einsum("oi,bihw->bohw", conv1.weight[:, :, 0, 0], feature_map) + conv1.bias[:, None, None])
    patches = hidden.relu().unfold(2, 2, 2).unfold(3, 2, 2)
    hidden = norm2(torch.einsum("oikl,bihwkl->bohw", conv2.weight, patches) + conv2.bias[:, None, None]).relu()
    hidden = norm3(torch.einsum("oi,bihw->bohw", conv3.weight[:, :, 0, 0], hidden) + conv3.bias[:, None, None])
    features = hidden.relu().mean(dim=(2, 3))
    logits, found = head(feature_map)
    torch.testing.assert_close(found, features)
    torch.testing.assert_close(logits, features @ head.classifier.weight.T + head.classifier.bias)


def test_token_exit_by_hand():
    head = TokenExit(channels=6, width=8, num_labels=4)
    feature_map = torch.randn(2, 6, 3, 5)
    tokens = feature_map.permute(0, 2, 3, 1).reshape(2, 15, 6)
    centred = tokens - tokens.mean(dim=2, keepdim=True)
    pooled = (centred / (centred.var(dim=2, unbiased=False, keepdim=True) + 1e-5).sqrt()).mean(dim=1)
    first, _, second = head.mlp
    features = nn.functional.gelu(pooled @ first.weight.T + first.bias) @ second.weight.T + second.bias
    logits, found = head(feature_map)
    torch.testing.assert_close(found, features)
    torch.testing.assert_close(logits, features @ head.classifier.weight.T + head.classifier.bias)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 8, 16, 32])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 7), (33, 40)])
def test_conv_exit_takes_maps_of_any_size(stride, size):
    head = ConvExit(channels=3, width=16, num_labels=4, stride=stride).eval()
    logits, features = head(torch.randn(2, 3, *size))
    assert logits.shape == (2, 4)
    assert features.shape == (2, 16)
    assert features.isfinite().all()


def test_a_large_stride_pools_instead_of_a_large_kernel():
    assert count(ConvExit(8, 64, 10, stride=32)) == count(ConvExit(8, 64, 10, stride=1))


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_efficientnet", "test_mambaout"])
def test_features_of_all_exits_can_be_compared(backbone):
    width = timm.create_model(backbone, num_classes=3).head_hidden_size
    model = MultiExitForImageClassification.from_backbone(backbone, num_labels=3).eval()
    output = model(torch.randn(2, 3, 160, 160))
    assert {tuple(features.shape) for features in output.exit_features} == {(2, width)}
    kind = TokenExit if backbone == "test_vit" else ConvExit
    assert all(isinstance(head, kind) for head in model.exits)
