"""Augmentation of image classification."""

from typing import Any

from torchvision.transforms import InterpolationMode, v2

from .arguments import DataArguments


def training_transform(arguments: DataArguments, data_config: dict[str, Any]) -> v2.Compose:
    """Return crop, flip and the augmentation that the options ask for; its uint8 output is normalised by the trainer.

    Args:
        arguments: The options of the data.
        data_config: As returned by ``timm.data.resolve_data_config``.

    Raises:
        ValueError: If ``auto_augment`` is unknown.
    """
    policies = {
        None: [],
        "autoaugment": [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
        "randaugment": [v2.RandAugment()],
    }
    if arguments.auto_augment not in policies:
        raise ValueError(f"--auto_augment takes autoaugment or randaugment, but got {arguments.auto_augment!r}.")
    size, interpolation = (
        arguments.image_size or data_config["input_size"][-1],
        InterpolationMode(data_config["interpolation"]),
    )
    if arguments.crop_scale is None:
        crop = [v2.Resize(size, interpolation), v2.RandomCrop(size, padding=arguments.crop_padding or None)]
    else:
        crop = [v2.RandomResizedCrop(size, scale=(arguments.crop_scale, 1.0), interpolation=interpolation)]
    grey = [round(255 * mean) for mean in data_config["mean"]]
    return v2.Compose(
        [
            *crop,
            *([v2.RandomHorizontalFlip()] if arguments.horizontal_flip else []),
            *policies[arguments.auto_augment],
            v2.PILToTensor(),
            *([v2.RandomErasing(arguments.random_erasing, value=grey)] if arguments.random_erasing else []),
        ]
    )


def mixing_transform(arguments: DataArguments, num_classes: int):
    """Return mixup, cutmix or a choice of both for batches; ``None`` if the options ask for neither."""
    transforms = []
    if arguments.mixup:
        transforms.append(v2.MixUp(alpha=arguments.mixup, num_classes=num_classes))
    if arguments.cutmix:
        transforms.append(v2.CutMix(alpha=arguments.cutmix, num_classes=num_classes))
    return v2.RandomChoice(transforms) if transforms else None
