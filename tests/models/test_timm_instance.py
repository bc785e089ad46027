"""Multi-exit models on timm models that exist already, and on files of timm's weights."""

import json
import warnings

import pytest
import timm
import timm.utils
import torch
import torchvision
from timm.models import save_for_hf

from hf_selfkd import MultiExitForImageClassification, MultiExitForSemanticSegmentation

from_backbone = MultiExitForImageClassification.from_backbone
VIT = {"img_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("name", "kwargs", "recorded"),
    [
        ("test_resnet", {"in_chans": 1, "num_classes": 5}, {"in_chans": 1}),
        ("test_vit", {**VIT, "drop_path_rate": 0.1, "num_classes": 7}, {**VIT, "drop_path_rate": 0.1}),
    ],
)
def test_a_timm_model_comes_with_its_weights(tmp_path, name, kwargs, recorded):
    plain = timm.create_model(name, **kwargs).eval()
    model = from_backbone(plain).eval()
    assert model.config.backbone == name
    assert model.config.backbone_kwargs == recorded
    images = torch.randn(2, kwargs.get("in_chans", 3), 32, 32)
    assert torch.equal(model(images).logits, plain(images))
    assert not set(model.parameters()) & set(plain.parameters())
    model.save_pretrained(tmp_path)
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images).logits, plain(images))  # mapped weights are aligned otherwise


def test_a_timm_model_keeps_its_statistics_and_label_names():
    plain = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)})
    plain.pretrained_cfg["label_names"] = ["cat", "dog", "cow"]
    model = from_backbone(plain)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    assert model.config.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]


def test_a_timm_model_gets_another_classifier(batch):
    plain = timm.create_model("test_resnet", num_classes=3).eval()
    model = from_backbone(plain, num_labels=5, exit_width=8, small_input_stem=True)
    assert model(batch["pixel_values"]).logits.shape == (8, 5)
    assert plain(batch["pixel_values"]).shape == (8, 3)
    assert torch.equal(model.backbone.layer1[0].conv1.weight, plain.layer1[0].conv1.weight)


def test_a_timm_model_in_half_precision_stays_so():
    model = from_backbone(timm.create_model("test_vit", num_classes=3, **VIT).bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_resized_timm_model_is_rebuilt_at_its_size(tmp_path):
    plain = timm.create_model("test_vit", num_classes=3)
    plain.set_input_size(img_size=64)
    model = from_backbone(plain)
    assert model.config.pretrained_cfg["input_size"] == [3, 64, 64]
    model.save_pretrained(tmp_path)
    assert MultiExitForImageClassification.from_pretrained(tmp_path).backbone.patch_embed.img_size == (64, 64)


def test_a_timm_model_gets_a_pyramid():
    plain = timm.create_model("test_resnet", num_classes=3)
    model = MultiExitForSemanticSegmentation.from_backbone(plain, num_labels=4, pyramid_width=8)
    assert torch.equal(model.backbone.layer1[0].conv1.weight, plain.layer1[0].conv1.weight)
    assert plain.fc.out_features == 3  # not pruned


def changed():
    model = timm.create_model("test_resnet", num_classes=3)
    model.layer1[0].act1 = torch.nn.GELU()
    return model


@pytest.mark.parametrize(
    ("backbone", "error", "message"),
    [
        (changed, ValueError, r"'test_resnet', .* layer1.0.act1 is ReLU\(inplace=True\) instead of GELU"),
        (lambda: timm.create_model("test_resnet", num_classes=0), ValueError, "no classifier .num_classes=0."),
        (lambda: timm.create_model("test_resnet", features_only=True), TypeError, "but got FeatureListNet"),
        (torchvision.models.resnet18, TypeError, "the name of a timm model or a classifier that timm.create_model"),
        (lambda: from_backbone("test_resnet", num_labels=3), TypeError, "Load it with from_pretrained"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(backbone, error, message):
    with pytest.raises(error, match=message):
        from_backbone(backbone())


def test_pretrained_is_for_names():
    with pytest.raises(ValueError, match="the timm model has weights"):
        from_backbone(timm.create_model("test_resnet"), pretrained=True)


def test_a_multi_exit_folder_is_no_timm_folder(build, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Load it with from_pretrained"):
        from_backbone(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(ValueError, match="Load it with from_pretrained"):
        from_backbone("test_resnet", backbone_kwargs={"checkpoint_path": str(tmp_path / "model.safetensors")})


@pytest.fixture
def weights(tmp_path):
    """Write a timm checkpoint of three classes with statistics of its own, and return the model and the file."""
    plain = timm.create_model("test_resnet", num_classes=3).eval()
    plain.pretrained_cfg |= {"mean": [0.1, 0.2, 0.3], "input_size": [3, 96, 96]}
    save_for_hf(plain, tmp_path, model_config={"label_names": ["cat", "dog", "cow"]}, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "test_resnet"
    return plain, {"checkpoint_path": str(tmp_path / "model.safetensors")}


@pytest.mark.parametrize("num_labels", [None, 3])
def test_a_file_of_weights_keeps_its_classes_size_and_statistics(weights, batch, num_labels):
    plain, kwargs = weights
    model = from_backbone("test_resnet", num_labels=num_labels, backbone_kwargs=kwargs).eval()
    assert torch.equal(model(batch["pixel_values"]).logits, plain(batch["pixel_values"]))
    assert list(model.config.id2label.values()) == ["cat", "dog", "cow"]
    assert model.config.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert model.config.pretrained_cfg["input_size"] == [3, 96, 96]


def test_a_file_of_weights_for_other_classes_gets_a_new_classifier(weights):
    plain, kwargs = weights
    with pytest.warns(UserWarning, match="classifier for 3 classes, so the one for num_labels=5 starts anew"):
        model = from_backbone("test_resnet", num_labels=5, backbone_kwargs=kwargs)
    assert torch.equal(model.backbone.layer1[0].conv1.weight, plain.layer1[0].conv1.weight)
    assert model.backbone.fc.out_features == 5
    assert list(model.config.id2label.values())[0] == "LABEL_0"
    assert model.config.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]


def test_a_file_of_weights_alone_is_loaded_as_before(tmp_path, batch):
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kwargs = {"checkpoint_path": str(tmp_path / "weights.pth")}
        model = from_backbone("test_resnet", num_labels=5, backbone_kwargs=kwargs).eval()
    assert torch.equal(model(batch["pixel_values"]).logits, plain(batch["pixel_values"]))
