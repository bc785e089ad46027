"""Whether a teacher and a student mean the same by their classes and images."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_match(teacher: nn.Module, model: nn.Module) -> None:
    """Compare class names, normalisation and image size of a teacher with those of the model.

    What one of the two does not say is not compared: names such as ``LABEL_0``, the normalisation of transformers'
    classifiers, which is that of their image processor.

    Args:
        teacher: A timm model, multi-exit model or transformers image classifier.
        model: The student, a multi-exit model.

    Raises:
        ValueError: If a class of both has another index in the teacher.
    """
    names, own_names = _class_names(teacher), _class_names(model)
    if names and own_names:
        _check_order(names, own_names)
    described, own = _describe_images(teacher), _describe_images(model)
    if names and own_names and set(names) != set(own_names):
        missing = sorted(set(own_names) - set(names))[:3]
        logger.warning("The teacher has other class names than the model, whose %s it does not have.", missing)
    for name in described.keys() & own.keys():
        if described[name] != own[name]:
            logger.warning(
                "The teacher is for images with %s %s, but the model for %s. It gets the model's images: choose a "
                "teacher for the same ones, or correct pretrained_cfg of the one that is described wrongly.",
                name,
                described[name],
                own[name],
            )


def _check_order(names: Sequence[str], own_names: Sequence[str]) -> None:
    """Raise ValueError if a name has another index; one that occurs twice says nothing (ImageNet has two cranes)."""
    counts, own_counts = Counter(names), Counter(own_names)
    index_of = dict(zip(names, range(len(names)), strict=True))
    for index, name in enumerate(own_names):
        if counts[name] == own_counts[name] == 1 and index_of[name] != index:
            raise ValueError(
                f"The teacher has the model's classes in another order: {name!r} is its class {index_of[name]}, but "
                f"class {index} of the model. Build the model with the teacher's id2label and number the labels of "
                "the data so, or choose a teacher with the model's order."
            )


def _class_names(network: nn.Module) -> list[str]:
    """Return the names of the classes by index; none if they have no names of their own."""
    if not isinstance(network, PreTrainedModel):
        return list((getattr(network, "pretrained_cfg", None) or {}).get("label_names") or [])
    names = [network.config.id2label[index] for index in sorted(network.config.id2label)]
    return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names


def _describe_images(network: nn.Module) -> dict[str, Any]:
    """Return mean, standard deviation and size of the images that a network is for, as far as they are known."""
    holder = network.config if isinstance(network, PreTrainedModel) else network
    data = getattr(holder, "pretrained_cfg", None) or {}
    found = {name: tuple(round(value, 4) for value in data[name]) for name in ("mean", "std") if name in data}
    size = tuple(data["input_size"][1:]) if "input_size" in data else getattr(holder, "image_size", None)
    size = getattr(getattr(network, "patch_embed", None), "img_size", None) or size  # timm's, built for another size
    if size is not None:
        found["size"] = (size, size) if isinstance(size, int) else tuple(size)
    return found
