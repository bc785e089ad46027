"""Images of other types, channels and sizes than the network's."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from hf_selfkd import ExitPolicy, MultiExitForImageClassification
from hf_selfkd.models.inputs import prepare_images
from tests.helpers.models import SWIN


def photo(size=(40, 32), mode="RGB"):
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], len(mode) if mode == "RGB" else 1))
    return Image.fromarray(pixels.astype("uint8").squeeze(), mode)


def test_grey_images_are_those_of_pillow():
    image = photo()
    rgb, grey = (torch.tensor(np.array(image.convert(mode)), dtype=torch.float32) for mode in ("RGB", "L"))
    network = torch.nn.Conv2d(1, 1, 1)
    converted = prepare_images(network, rgb.permute(2, 0, 1)[None], channels=1)[0, 0]
    torch.testing.assert_close(converted, grey, atol=1.0, rtol=0.0)  # Pillow rounds


def test_float_images_enter_a_model_in_half_precision(build, batch):
    dtype = torch.bfloat16
    model = build().eval().to(dtype)
    images = batch["pixel_values"][:2]
    output = model(images)
    assert {logits.dtype for logits in output.exit_logits} == {dtype}
    torch.testing.assert_close(output.logits, model(images.to(dtype)).logits)
    early = model.early_exit(images, ExitPolicy(thresholds=[2.0] * 3))
    torch.testing.assert_close(early.logits, output.logits, atol=0.1, rtol=0.1)


def test_segmentation_of_float_images_in_half_precision(build_segmenter):
    model = build_segmenter().eval().to(torch.bfloat16)
    assert model(torch.randn(1, 3, 64, 64)).logits.dtype == torch.bfloat16


def test_evaluation_in_half_precision(build, train, images):
    trainer = train(build(), max_steps=1, bf16_full_eval=True, trainer_kwargs={"eval_dataset": images[:2]})
    assert 0 <= trainer.evaluate()["eval_exit_0_accuracy"] <= 1


def test_a_checkpoint_in_bfloat16_is_all_that_pipeline_needs(build, tmp_path):
    build().to(torch.bfloat16).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path))
    assert classify.model.dtype == torch.bfloat16
    assert sum(row["score"] for row in classify(photo(), top_k=5)) == pytest.approx(1, abs=1e-3)


def test_attention_is_that_of_torch(build, tmp_path):
    build("test_vit").save_pretrained(tmp_path)
    model = MultiExitForImageClassification.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 5)


def test_integers_are_not_normalised_images(build, batch):
    pixels = batch["pixel_values"].to(torch.uint8)
    model, policy = build().eval(), ExitPolicy(thresholds=[0.5] * 3)
    for call in (model, lambda images: model.early_exit(images, policy)):
        with pytest.raises(ValueError, match="in a floating point type, but got torch.uint8"):
            call(pixels)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_channels_that_the_network_does_not_take(build, in_chans):
    model = build(backbone_kwargs={"in_chans": in_chans}).eval()
    with pytest.raises(ValueError, match=rf"images \(batch, {in_chans}, height, width\), but got \(2, 2, 32, 32"):
        model(torch.randn(2, 2, 32, 32))
    with pytest.raises(ValueError, match="takes images"):
        model(torch.randn(in_chans, 32, 32))


def test_grey_models_work_in_pipelines(build, tmp_path):
    model = build(backbone_kwargs={"in_chans": 1}).eval()
    model.save_pretrained(tmp_path)
    grey = photo(mode="L")
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(grey, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 1, 32, 32)
    expected = model(pixel_values).logits.softmax(dim=1)[0].sort(descending=True).values.tolist()
    classify = pipeline("image-classification", model=str(tmp_path))
    for row in classify([grey, grey.convert("RGB")], top_k=5):  # it reads every image as RGB
        assert [prediction["score"] for prediction in row] == pytest.approx(expected, abs=1e-4)


def test_grey_segmentation_works_in_pipelines(build_segmenter, tmp_path):
    build_segmenter(backbone_kwargs={"in_chans": 1}).save_pretrained(tmp_path)
    grey = photo(mode="L")
    segment = pipeline("image-segmentation", model=str(tmp_path))
    found, expected = (segment(image) for image in (grey.convert("RGB"), grey))
    assert [mask["mask"].tobytes() for mask in found] == [mask["mask"].tobytes() for mask in expected]


def test_a_size_that_the_backbone_does_not_take_is_named(build):
    model = build("swin_tiny_patch4_window7_224", backbone_kwargs=SWIN).eval()
    policy = ExitPolicy(thresholds=[0.5] * 3)
    for call in (model, lambda images: model.early_exit(images, policy)):
        with pytest.raises(ValueError, match=r"does not take images of 48x48 pixels: .*'img_size': \[48, 48\]"):
            call(torch.randn(2, 3, 48, 48))
