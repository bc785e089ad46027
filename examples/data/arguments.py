"""Command-line options of the data, and their description for the model card."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet-1k": "ILSVRC/imagenet-1k",
}


@dataclass
class EvaluationArguments:
    """Options of the dataset that training and calibration share."""

    dataset: str = field(metadata={"help": "A folder that load_dataset reads, or a repository on the Hub."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the only column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the only column of class labels."})
    evaluation_split: str | None = field(default=None, metadata={"help": "Default: test, else validation."})
    eval_share: float | None = field(
        default=None,
        metadata={"help": "Share of the training images to hold out for evaluation, where there is no split for it."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on N images only: the first, or any where classes lie together."}
    )


@dataclass
class SplitArguments(EvaluationArguments):
    """Options of the dataset that classification and segmentation share."""

    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on N images only: the first, or any where classes lie together."}
    )
    skip_bad_images: int = field(
        default=0,
        metadata={"help": "Skip up to N unreadable training images; reads every image once before training."},
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})


@dataclass
class DataArguments(SplitArguments):
    """Dataset and augmentation of image classification."""

    dataset: str = field(
        default="cifar100",
        metadata={
            "help": "cifar100, cifar10, imagenet-1k, digits (needs no network), or a folder of parquet or image files."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data while training, without storing it."})
    num_train_images: int | None = field(
        default=None, metadata={"help": "Images of a stream whose length is unknown; needed to count epochs."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images that each worker shuffles in streaming."})
    image_size: int | None = field(default=32, metadata={"help": "Side of the images in pixels."})
    mean: list[float] | None = field(
        default_factory=lambda: list(CIFAR_MEAN), metadata={"help": "Of red, green and blue, without --pretrained."}
    )
    std: list[float] | None = field(
        default_factory=lambda: list(CIFAR_STD), metadata={"help": "Of red, green and blue, without --pretrained."}
    )
    crop_pct: float | None = field(default=1.0, metadata={"help": "Share of each side that evaluation crops."})
    crop_padding: int = field(default=4, metadata={"help": "Padding of the random crop in pixels."})
    crop_scale: float | None = field(
        default=None,
        metadata={"help": "Minimum area share of a random resized crop, used instead of the padded one."},
    )
    auto_augment: str | None = field(default=None, metadata={"help": "autoaugment (CIFAR-10 policy) or randaugment."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle."})
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup, 0 for none."})
    cutmix: float = field(
        default=0.0, metadata={"help": "Alpha of cutmix, 0 for none; with mixup, each batch draws one of the two."}
    )


def describe_data(arguments: DataArguments) -> dict[str, Any]:
    """Return name and augmentation of the data, for the model card."""
    crop = "crop_padding" if arguments.crop_scale is None else "crop_scale"
    augmentation = (crop, "horizontal_flip", "auto_augment", "random_erasing", "mixup", "cutmix")
    recipe = {name: getattr(arguments, name) for name in augmentation if getattr(arguments, name)}
    if arguments.dataset in HUB_DATASETS:
        return {"dataset": arguments.dataset, "dataset_tags": HUB_DATASETS[arguments.dataset], "recipe": recipe}
    name = "scikit-learn digits" if arguments.dataset == "digits" else Path(arguments.dataset).resolve().name
    return {"dataset": name, "recipe": recipe}
