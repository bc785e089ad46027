"""What is saved can be loaded: a model is compared with what its configuration builds."""

import copy

import pytest
import timm.utils
import torch

from hf_selfkd import MultiExitForImageClassification

SWIN_SIZES = {"img_size": 56, "window_size": 7, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2)}


def reparameterize(model):
    timm.utils.reparameterize_model(model.backbone, inplace=True)


def resize(model):
    model.backbone.set_input_size(img_size=64)


def replace_classifier(model):
    model.backbone.reset_classifier(7)


def change_num_labels(model):
    model.config.num_labels = 7


@pytest.mark.parametrize(
    ("backbone", "change", "message"),
    [
        ("repvgg_a0", reparameterize, "it has backbone.stages.0.0.reparam_conv.bias, .* reparameterize after loading"),
        ("test_vit", resize, r"backbone.pos_embed is \(1, 65, 64\) instead of \(1, 17, 64\)"),
        ("test_resnet", replace_classifier, "The classifier has 7 classes, but config.num_labels is 5"),
        ("test_resnet", change_num_labels, "The classifier has 5 classes, but config.num_labels is 7"),
    ],
)
def test_a_changed_model_is_not_saved(build, tmp_path, backbone, change, message):
    model = build(backbone)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_changed_model_is_not_trained_if_it_is_to_be_saved(build, train):
    model = build("test_vit")
    resize(model)
    with pytest.raises(ValueError, match="is not the one that its configuration builds"):
        train(model, save_strategy="epoch")


def test_tables_of_another_image_size_are_reported(tmp_path):
    model = MultiExitForImageClassification.from_backbone(
        "swin_tiny_patch4_window7_224", num_labels=5, backbone_kwargs=SWIN_SIZES, exits=[0]
    )
    model.backbone.set_input_size(img_size=112, window_size=7)
    with pytest.warns(UserWarning, match="another image size .*img_size"):
        model.save_pretrained(tmp_path)


def test_frozen_batch_norm_is_saved_and_loaded(build, batch, tmp_path):
    model = build()
    model.train()(batch["pixel_values"])
    timm.utils.freeze(model.backbone, ["layer1"])
    model.save_pretrained(tmp_path)
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(batch["pixel_values"]).logits, model.eval()(batch["pixel_values"]).logits)
    counts = [getattr(loaded.backbone, layer)[0].bn1.num_batches_tracked.item() for layer in ("layer1", "layer2")]
    assert counts == [0, 1]


def test_a_replaced_classifier_or_stage_is_named(build, batch):
    model = build()
    replace_classifier(model)
    with pytest.raises(ValueError, match="classifier of the backbone was replaced by one for 7 classes"):
        model(batch["pixel_values"])
    model = build()
    model.backbone.layer4[0] = copy.deepcopy(model.backbone.layer4[0])
    model.backbone.layer4[0]._forward_hooks.clear()
    with pytest.raises(ValueError, match="module layer4.0 of the backbone, which ends a stage, was replaced"):
        model(batch["pixel_values"])
