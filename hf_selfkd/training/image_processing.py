"""The images of a run and those that the image processor of its checkpoint makes: they should be the same."""

from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedConfig, Trainer
from transformers.utils import logging

logger = logging.get_logger(__name__)


def adopt_image_processor(processor: Any, config: PreTrainedConfig) -> None:
    """Make checkpoints name the image processor of the run, so that pipelines use it, with its size and statistics.

    The trainer writes its other settings to ``preprocessor_config.json``.

    Args:
        processor: ``processing_class`` of the trainer; ``None`` keeps the model's own.
        config: Configuration of the model, changed in place.

    Raises:
        TypeError: If it is not an image processor, and no processor that has one.
    """
    if processor is None:
        return
    given, processor = processor, getattr(processor, "image_processor", processor)
    if not isinstance(processor, BaseImageProcessor):
        raise TypeError(
            "processing_class must be an image processor, which checkpoints of multi-exit models have, but got "
            f"{given!r}."
        )
    data = dict(config.pretrained_cfg or {})
    channels = data["input_size"][0]
    if hasattr(processor, "data_config"):  # timm's own settings
        data |= {name: value for name, value in processor.data_config.items() if name in data}
    elif processor.do_normalize:
        data |= {"mean": processor.image_mean, "std": processor.image_std}
    sizes = {_output_size(processor, side) for side in (200, 300)}
    if len(sizes) == 1:  # whatever the image has
        data["input_size"] = [channels, *sizes.pop()]
    config.pretrained_cfg = {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
    config.image_processor_type = processor.to_dict()["image_processor_type"]


def _output_size(processor: BaseImageProcessor, side: int) -> tuple[int, int]:
    """Return height and width of what becomes of a square image."""
    images = processor(PIL.Image.new("RGB", (side, side)), return_tensors="pt")["pixel_values"]
    return tuple(torch.as_tensor(images).shape[-2:])


def warn_about_size(images: Tensor | None, trainer: Trainer) -> None:
    """Warn once if images have another size than those of the checkpoint's image processor.

    Training images may be smaller crops, so they count only where nothing is evaluated.

    Args:
        images: ``(batch, channels, height, width)``, if the batch has any.
        trainer: The trainer.
    """
    if images is None or images.dim() != 4:
        return
    if trainer.model.training and trainer.args.eval_strategy != "no":
        return
    expected = tuple((trainer.network.config.pretrained_cfg or {}).get("input_size", ()))
    if expected and tuple(images.shape[2:]) != expected[1:]:
        height, width = images.shape[2:]
        logger.warning_once(
            f"The images have {height}x{width} pixels, but the image processor of the checkpoint, which pipelines "
            f"use, makes {expected[1]}x{expected[2]}. Set model.config.pretrained_cfg |= {{'input_size': "
            f"{[expected[0], height, width]}}}, or pass the image processor of the data as processing_class."
        )
