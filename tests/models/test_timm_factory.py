import json

import pytest
import timm
import torch
from torch import nn

from hf_selfkd import MultiExitConfig, MultiExitForImageClassification
from hf_selfkd.models.timm_factory import create_backbone
from tests.helpers.runs import same_weights


def create(name, **kwargs):
    return create_backbone(name, **({"num_classes": 5, "small_input_stem": False, "exit_width": None} | kwargs))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "Unknown timm model 'resnet81'. Did you mean 'resnet18'?"),
        ("resnet81.a1_in1k", "Unknown timm model 'resnet81.a1_in1k'. Did you mean 'resnet18'?"),
        ("qqqqqq", "Unknown timm model 'qqqqqq'. See timm.list_models()."),
        ("", "Unknown timm model ''. See timm.list_models()."),
        ("resnet18.mine", "timm model 'resnet18' has no tag 'mine'. Available: a1_in1k, a2_in1k,"),
        ("timm/resnet18", "Use 'hf-hub:timm/resnet18' to load from the Hub"),
        ("ftp:resnet18", "Unknown model source 'ftp' in model name"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError) as error:
        create(name)
    assert message in str(error.value)


def test_names_may_carry_a_tag_or_be_deprecated():
    with torch.device("meta"):
        assert create("resnet18.a1_in1k").pretrained_cfg["tag"] == "a1_in1k"
        with pytest.warns(UserWarning, match="deprecated"):
            assert create("tf_efficientnet_b0_ns").pretrained_cfg["architecture"] == "tf_efficientnet_b0"


def test_models_that_cannot_have_exits(monkeypatch):
    with torch.device("meta"):
        with pytest.raises(ValueError, match=r"'qwen3_vit_88m_enc' is an encoder.*, such as 'qwen3_vit_88m'\."):
            create("qwen3_vit_88m_enc")
        with pytest.raises(ValueError, match="'vit_base_patch16_siglip_224' has no classes of its own. Pass num_lab"):
            create("vit_base_patch16_siglip_224", num_classes=None)
        assert create("vit_base_patch16_siglip_224", num_classes=3).num_classes == 3
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: nn.Linear(1, 1))
    with pytest.raises(ValueError, match="'resnet18' has no feature_info.*or give the class that attribute"):
        create("resnet18")


@pytest.mark.parametrize("tag", ["r160_in1k", "mine"])
def test_a_folder_of_timm_keeps_its_architecture_and_arguments(tmp_path, tag):
    plain = timm.create_model("test_vit", num_classes=7, img_size=64).eval()
    plain.pretrained_cfg["tag"] = tag
    timm.models.save_for_hf(plain, tmp_path, model_args={"img_size": 64, "num_classes": 7})
    model = MultiExitForImageClassification.from_backbone(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert model.config.backbone == "test_vit"
    assert model.config.backbone_kwargs["img_size"] == [64, 64]
    assert model.config.num_labels == 7
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).logits, plain(images))
    model.save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))
    again = MultiExitForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, plain(images))


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:folder", "timm/resnet18"])
def test_a_configuration_fetches_nothing(name):
    with pytest.raises(ValueError, match="A configuration may only name a timm architecture"):
        MultiExitConfig(backbone=name)


# Sides of the maps of a 32-pixel image.
SMALL_STEMS = {
    "resnet18": [32, 32, 16, 8, 4],
    "resnet50d": [32, 32, 16, 8, 4],  # three 3x3 convolutions
    "seresnext26t_32x4d": [32, 32, 16, 8, 4],
    "wide_resnet50_2": [32, 32, 16, 8, 4],
    "legacy_seresnet18": [32, 32, 16, 8, 4],
    "resnetv2_18": [32, 32, 16, 8, 4],
    "nf_resnet26": [32, 32, 16, 8, 4],
    "densenet121": [32, 32, 16, 8, 4],
    "dpn48b": [32, 32, 16, 8, 4],
    "hgnet_tiny": [32, 16, 8, 4],
    "hgnetv2_b0": [16, 8, 4, 2],  # its pooling is one of two paths and stays
    "efficientnet_b0": [32, 16, 8, 4, 2],
    "tf_efficientnet_b0": [32, 16, 8, 4, 2],
    "mobilenetv3_small_050": [32, 16, 8, 4, 2],
    "regnety_002": [32, 16, 8, 4, 2],
}


@pytest.mark.parametrize("name", SMALL_STEMS)
def test_small_input_stem(name):
    with torch.device("meta"), torch.no_grad():
        backbone = create(name, small_input_stem=True).eval()
        images = torch.empty(2, 3, 32, 32)
        maps = backbone.forward_intermediates(images, intermediates_only=True)
        assert [feature_map.shape[-1] for feature_map in maps] == SMALL_STEMS[name]
        assert backbone(images).shape == (2, 5)


def test_small_input_stem_keeps_what_it_can():
    torch.manual_seed(0)
    plain = timm.create_model("test_efficientnet", num_classes=5)
    torch.manual_seed(0)
    small = create("test_efficientnet", small_input_stem=True)
    assert same_weights(plain, small)
    assert small.conv_stem.stride == (1, 1)
    conv = create("nf_resnet26", small_input_stem=True).stem.conv
    assert type(conv) is type(timm.create_model("nf_resnet26").stem.conv)  # with standardised weights
    assert conv.kernel_size == (3, 3)
    assert conv.padding == (1, 1)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "swin_tiny_patch4_window7_224", "vgg11", "tresnet_m"])
def test_small_input_stem_needs_a_strided_convolution(name):
    with torch.device("meta"), pytest.raises(ValueError, match=rf"'{name}' does not.*'img_size': 32, 'patch_size': 4"):
        create(name, small_input_stem=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "samvit_base_patch16_224"])
def test_exit_width_puts_a_projection_before_the_classifier(name):
    with torch.device("meta"):
        plain, projected = create(name), create(name, exit_width=24)
        width = plain.head_hidden_size
        added = {key: tensor.shape for key, tensor in projected.state_dict().items() if key not in plain.state_dict()}
        assert sorted(added.values()) == [(5,), (5, 24), (24,), (24, width)]
        assert projected(torch.empty(2, 3, *projected.pretrained_cfg["input_size"][1:])).shape == (2, 5)
        assert create(name, exit_width=width).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(("name", "kind"), [("levit_128s", "tuple"), ("crossvit_tiny_240", "ModuleList")])
def test_exit_width_needs_one_linear_classifier(name, kind):
    with torch.device("meta"), pytest.raises(ValueError, match=f"that of '{name}' is a {kind}. Leave exit_width at"):
        create(name, exit_width=24)
