"""What the run is given as processing_class is what its checkpoint uses."""

import logging

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, SegformerImageProcessor, TimmWrapperImageProcessor, ViTImageProcessor
from transformers.utils import logging as transformers_logging

from hf_selfkd import MultiExitConfig
from hf_selfkd.training.image_processing import adopt_image_processor, warn_about_size

VIT = ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])


@pytest.fixture
def warnings_of(monkeypatch, caplog):
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(transformers_logging.get_logger("hf_selfkd"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "pixels" in record.getMessage()]


def test_a_checkpoint_uses_the_image_processor_of_its_run(build, train, images, tmp_path):
    small = [image | {"pixel_values": image["pixel_values"][:, :24, :24]} for image in images]
    data = {"train_dataset": small, "eval_dataset": small}
    trainer = train(build(), "none", max_steps=1, trainer_kwargs={"processing_class": VIT, **data})
    trainer.save_model(tmp_path / "saved")
    photo = Image.effect_noise((50, 40), 100).convert("RGB")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    expected = VIT(photo, return_tensors="pt")["pixel_values"]
    assert torch.equal(loaded(photo, return_tensors="pt")["pixel_values"], expected)
    settings = trainer.network.config.pretrained_cfg
    assert (settings["input_size"], settings["mean"]) == ([3, 24, 24], [0.1, 0.2, 0.3])
    trainer.network.save_pretrained(tmp_path / "saved")  # again, over the file of the processor
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "saved").image_mean) == [0.1, 0.2, 0.3]


def test_an_image_processor_of_timm_sets_what_timm_reads():
    config = MultiExitConfig(pretrained_cfg={"input_size": [3, 32, 32], "mean": [0.5] * 3, "crop_pct": 0.9})
    given = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "crop_pct": 1.0}
    adopt_image_processor(TimmWrapperImageProcessor(given), config)
    assert config.pretrained_cfg == {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "crop_pct": 1.0}
    assert config.image_processor_type == "TimmWrapperImageProcessor"


def test_a_size_that_follows_the_image_is_not_recorded():
    config = MultiExitConfig(pretrained_cfg={"input_size": [3, 32, 32]})
    adopt_image_processor(SegformerImageProcessor(do_resize=False), config)
    assert config.pretrained_cfg["input_size"] == [3, 32, 32]


def test_other_processors_are_refused():
    with pytest.raises(TypeError, match="processing_class must be an image processor, .* but got 'ViT'"):
        adopt_image_processor("ViT", MultiExitConfig())


def test_images_of_another_size_than_the_checkpoints_give_one_warning(build, train, images, warnings_of):
    small = [image | {"pixel_values": image["pixel_values"][:, :24, :24]} for image in images]
    trainer = train(build(), "none", max_steps=2, trainer_kwargs={"train_dataset": small, "eval_dataset": small})
    trainer.evaluate()
    assert len(warnings_of()) == 1
    assert "have 24x24 pixels" in warnings_of()[0] and "makes 32x32" in warnings_of()[0]
    trainer.network.config.pretrained_cfg["input_size"] = [3, 24, 24]
    warn_about_size(small[0]["pixel_values"][None], trainer)
    assert len(warnings_of()) == 1


def test_training_crops_may_differ_where_evaluation_shows_the_size(build, train, images, warnings_of):
    small = [image | {"pixel_values": image["pixel_values"][:, :20, :20]} for image in images]
    train(build(), "none", max_steps=1, eval_strategy="epoch", trainer_kwargs={"train_dataset": small})
    assert warnings_of() == []
