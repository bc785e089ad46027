"""Features of a trained model: AutoModel and the pipeline for feature extraction."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, pipeline

from hf_selfkd import MultiExitModel
from hf_selfkd.models.configuration import MultiExitConfig


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize(("backbone", "shape"), [("test_resnet", (8, 96, 4, 4)), ("test_vit", (8, 17, 64))])
def test_auto_model_gives_the_features_of_the_backbone(build, batch, tmp_path, backbone, shape):
    model = build(backbone).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MultiExitModel
    with torch.no_grad():
        found = loaded(batch["pixel_values"], output_hidden_states=True)
        expected = model(batch["pixel_values"], output_hidden_states=True)
        plain = model.backbone.forward_features(batch["pixel_values"])
    assert found.last_hidden_state.shape == shape
    torch.testing.assert_close(found.last_hidden_state, plain)
    torch.testing.assert_close(found.pooler_output, expected.exit_features[-1])
    torch.testing.assert_close(found.hidden_states, expected.exit_maps)
    torch.testing.assert_close(model.backbone.get_classifier()(found.pooler_output), expected.logits)


def test_the_pipeline_extracts_features(build, tmp_path, picture):
    model = build().eval()
    model.save_pretrained(tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path), pool=True)
    one = extract(picture)
    assert np.shape(one) == (1, 96)
    pixel_values = extract.image_processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values).exit_features[-1]
    torch.testing.assert_close(torch.tensor(one), expected)
    several = extract([picture] * 3, batch_size=2)
    torch.testing.assert_close(torch.tensor(several), expected.expand(3, 1, -1))


def test_features_are_saved_as_the_complete_model(build, batch, tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path / "model")
    AutoModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "features")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "features")
    with torch.no_grad():
        found, expected = loaded(batch["pixel_values"]), model(batch["pixel_values"])
    torch.testing.assert_close(found.exit_logits, expected.exit_logits)
    auto_map = MultiExitConfig.from_pretrained(tmp_path / "features").auto_map
    assert auto_map == MultiExitConfig.from_pretrained(tmp_path / "model").auto_map
    assert auto_map["AutoModel"] == "modeling_classification.MultiExitModel"


def test_a_segmentation_model_has_no_pooled_features(build_segmenter, tmp_path):
    build_segmenter().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this is a checkpoint for segmentation"):
        AutoModel.from_pretrained(tmp_path)
