"""Between plain timm checkpoints and multi-exit ones."""

import json

import pytest
import timm
import torch
from huggingface_hub import upload_folder
from transformers import AutoModelForImageClassification

from hf_selfkd import MultiExitForImageClassification

BACKBONES = {
    "test_resnet": {},
    "test_vit": {"img_size": 32, "patch_size": 8},
    "test_convnext": {},
    "coat_lite_tiny": {},  # shares modules, whose tensors safetensors would refuse
}


def create(name, **config):
    torch.manual_seed(0)
    labels = {"num_labels": 5, "id2label": dict(enumerate("abcde"))}
    kwargs = BACKBONES[name]
    return MultiExitForImageClassification.from_backbone(name, backbone_kwargs=kwargs, **(labels | config)).eval()


def logits(model, images):
    with torch.no_grad():
        output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


def transforms(data):
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return json.loads(json.dumps({key: data[key] for key in keys}))


def image_batch(model):
    return torch.randn(2, *model.config.pretrained_cfg["input_size"])


@pytest.mark.parametrize("name", BACKBONES)
def test_timm_loads_the_backbone(name, tmp_path):
    model = create(name)
    model.save_timm(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    images = image_batch(model)
    by_path = timm.create_model(
        name, num_classes=5, checkpoint_path=tmp_path / "model.safetensors", **BACKBONES[name]
    ).eval()
    by_folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for plain in (by_path, by_folder):
        state = plain.state_dict()
        assert state.keys() == model.backbone.state_dict().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.backbone.state_dict().items())
        assert torch.equal(logits(plain, images), logits(model, images))
    assert by_folder.pretrained_cfg["label_names"] == list("abcde")
    assert transforms(by_folder.pretrained_cfg) == transforms(model.config.pretrained_cfg)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_a_projection_is_folded_into_the_classifier(name, tmp_path):
    model = create(name, exit_width=24)
    model.save_timm(tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(plain.get_classifier(), torch.nn.Linear)
    images = image_batch(model)
    torch.testing.assert_close(logits(plain, images), logits(model, images), atol=1e-5, rtol=1e-5)
    assert len(model.classifiers) == 1
    assert model.backbone.get_classifier()[0].out_features == 24  # the model itself stays as it was


def test_a_stem_that_timm_does_not_have_is_refused(build, tmp_path):
    with pytest.raises(
        ValueError, match="small_input_stem builds a stem that no timm architecture has.*save_pretrain"
    ):
        build().save_timm(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_multi_exit_model_is_not_written_over(tmp_path):
    model = create("test_resnet")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match="holds a multi-exit model, whose files have the names of timm's. Choose another"
    ):
        model.save_timm(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_there_and_back_by_the_hub(hub, tmp_path):
    """timm fetches what save_timm wrote, from_backbone gives it exits again, transformers' timm wrapper reads it."""
    model = create("test_vit")
    images = image_batch(model)
    model.save_timm(tmp_path / "plain")
    hub.create("ada/plain")
    upload_folder(repo_id="ada/plain", folder_path=tmp_path / "plain")
    plain = timm.create_model("hf-hub:ada/plain", pretrained=True, cache_dir=tmp_path / "cache").eval()
    assert torch.equal(logits(plain, images), logits(model, images))
    again = MultiExitForImageClassification.from_backbone("hf-hub:ada/plain", pretrained=True).eval()
    assert torch.equal(logits(again, images), logits(model, images))
    assert again.config.backbone == "test_vit"
    assert again.config.id2label == dict(enumerate("abcde"))
    assert transforms(again.config.pretrained_cfg) == transforms(model.config.pretrained_cfg)
    wrapped = AutoModelForImageClassification.from_pretrained("ada/plain").eval()
    torch.testing.assert_close(logits(wrapped, images), logits(model, images), atol=1e-5, rtol=1e-5)


def test_from_a_file_of_weights(tmp_path):
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    kwargs = {"checkpoint_path": str(tmp_path / "weights.pth")}
    model = MultiExitForImageClassification.from_backbone("test_resnet", num_labels=5, backbone_kwargs=kwargs).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(logits(model, images), logits(plain, images))
    model.save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))
