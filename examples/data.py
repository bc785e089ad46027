"""Image data sets for the examples: found by name or folder, read, augmented."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
)
from PIL import Image as PILImage
from torchvision.transforms import InterpolationMode, v2

from hf_selfkd.training.streaming import SeededStream

HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet-1k": "ILSVRC/imagenet-1k",
}
EVALUATION_SPLITS = ("test", "validation", "valid", "val")
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass
class DataArguments:
    """Which images, and how they are varied in training."""

    dataset: str = field(
        default="cifar100",
        metadata={
            "help": "cifar100, cifar10, imagenet-1k, digits (needs no network), or a folder of parquet or image files."
        },
    )
    evaluation_split: str | None = field(default=None, metadata={"help": "Default: test, else validation."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training, without storing it."})
    num_train_images: int | None = field(
        default=None, metadata={"help": "Images of a stream, where it does not say: with it epochs are known."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images that a worker mixes at a time in streaming."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the only column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the only column of class labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many images only."})
    skip_bad_images: int = field(
        default=0,
        metadata={"help": "Leave out up to so many training images that cannot be read; all are read once before."},
    )
    image_size: int = field(default=32, metadata={"help": "Side of the images in pixels."})
    mean: list[float] = field(default_factory=lambda: list(CIFAR_MEAN), metadata={"help": "Of red, green and blue."})
    std: list[float] = field(default_factory=lambda: list(CIFAR_STD), metadata={"help": "Of red, green and blue."})
    crop_pct: float = field(default=1.0, metadata={"help": "Share of each side that evaluation crops."})
    crop_padding: int = field(default=4, metadata={"help": "Padding of the random crop in pixels."})
    crop_scale: float | None = field(
        default=None, metadata={"help": "Least share of the area in a random resized crop, in place of that one."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror half of the images."})
    auto_augment: str | None = field(default=None, metadata={"help": "autoaugment (CIFAR-10 policy) or randaugment."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle."})
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup, 0 for none."})
    cutmix: float = field(
        default=0.0, metadata={"help": "Alpha of cutmix, 0 for none; beside mixup, either by chance."}
    )


def load_images(arguments: DataArguments, num_workers: int = 0) -> tuple[DatasetDict | IterableDatasetDict, list[str]]:
    """Load training and evaluation images, or open streams of them.

    Args:
        arguments: Which.
        num_workers: Processes that look for bad images.

    Returns:
        The splits ``train`` and ``test`` with the columns ``image`` (encoded) and ``label``, and the class names.

    Raises:
        ValueError: If the data cannot be found or reached, its columns are not clear, or more images than may be left
            out cannot be read.
    """
    if arguments.streaming:
        for name in ("max_train_samples", "max_eval_samples", "skip_bad_images"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} is not for streams, which are not read before training. Leave it out.")
    splits = _digits() if arguments.dataset == "digits" else _load(arguments.dataset, arguments.streaming)
    if "train" not in splits:
        raise ValueError(f"{arguments.dataset} has the splits {', '.join(splits)}, but none called train.")
    wanted = [arguments.evaluation_split] if arguments.evaluation_split else EVALUATION_SPLITS
    evaluation = next((name for name in wanted if name in splits), None)
    if evaluation is None:
        raise ValueError(
            f"{arguments.dataset} has the splits {', '.join(splits)}, but none to evaluate on: "
            f"one of {', '.join(wanted)} is needed."
        )
    features = splits["train"].features
    image = _find_column(features, arguments.image_column, Image, "image")
    label = _find_column(features, arguments.label_column, ClassLabel, "label")
    if image == label:
        raise ValueError(f"--image_column and --label_column both name {image!r}.")
    limits = {"train": arguments.max_train_samples, "test": arguments.max_eval_samples}
    chosen = type(splits)(train=splits["train"], test=splits[evaluation])
    for name, split in chosen.items():
        if limits[name]:
            split = split.select(range(min(limits[name], len(split))))
        names = {image: "image", label: "label"}
        split = split.select_columns([image, label])
        split = split.rename_columns({old: new for old, new in names.items() if old != new})
        chosen[name] = split.cast_column("image", Image(decode=False))
    if arguments.skip_bad_images:
        chosen["train"] = leave_out_bad_images(chosen["train"], read_row, arguments.skip_bad_images, num_workers)
    return chosen, _class_names(chosen, label)


def card_facts(arguments: DataArguments) -> dict[str, Any]:
    """Return what the model card tells of the data: what it is called, and how it was varied in training."""
    crop = "crop_padding" if arguments.crop_scale is None else "crop_scale"
    augmentation = (crop, "horizontal_flip", "auto_augment", "random_erasing", "mixup", "cutmix")
    recipe = {name: getattr(arguments, name) for name in augmentation if getattr(arguments, name)}
    if arguments.dataset in HUB_DATASETS:
        return {"dataset": arguments.dataset, "dataset_tags": HUB_DATASETS[arguments.dataset], "recipe": recipe}
    name = "scikit-learn digits" if arguments.dataset == "digits" else Path(arguments.dataset).resolve().name
    return {"dataset": name, "recipe": recipe}


def _load(name: str, streaming: bool) -> DatasetDict | IterableDatasetDict:
    if name not in HUB_DATASETS and not Path(name).is_dir():
        known = ", ".join([*HUB_DATASETS, "digits"])
        raise ValueError(f"--dataset takes {known} or an existing folder, but got {name!r}.")
    try:
        return load_dataset(HUB_DATASETS.get(name, name), streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        if name not in HUB_DATASETS:
            raise ValueError(f"The folder {name!r} holds neither parquet files nor images.") from error
        raise ValueError(
            f"{HUB_DATASETS[name]} could not be had from the Hub ({error}). Without network use --dataset digits, "
            "or --dataset with a local folder of parquet files or images."
        ) from error


def _digits() -> DatasetDict:
    """Return scikit-learn's handwritten digits: 1,797 real scans of 8x8 pixels, 360 of them for evaluation."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    pixels = (scans.reshape(-1, 8, 8) / 16 * 255).astype("uint8")
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = {"image": [PILImage.fromarray(scan) for scan in pixels], "label": labels.tolist()}
    return Dataset.from_dict(rows, features=features).train_test_split(360, seed=0, stratify_by_column="label")


def _find_column(features: Features, name: str | None, kind: type, what: str) -> str:
    if name is not None:
        if name not in features:
            raise ValueError(f"--{what}_column {name!r} is not among the columns: {', '.join(features)}.")
        if kind is Image and not isinstance(features[name], Image):
            raise ValueError(f"--{what}_column {name!r} holds no images, but {features[name]}.")
        return name
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    named = [column for column in ("image", "img", "label", "labels") if column in features and what[:2] in column]
    if len(found) == 1:
        return found[0]
    if found == [] and len(named) == 1 and kind is ClassLabel:
        return named[0]
    if "fine_label" in found:  # CIFAR-100 has its twenty superclasses beside the hundred classes
        return "fine_label"
    raise ValueError(
        f"{'No' if not found else 'More than one'} {what} column was found among {', '.join(features)}. "
        f"Name it with --{what}_column."
    )


def _class_names(splits: DatasetDict, column: str) -> list[str]:
    feature = splits["train"].features["label"]
    if isinstance(feature, ClassLabel):
        return feature.names
    if isinstance(splits, IterableDatasetDict):
        raise ValueError(f"Streams need class labels with their names, but column {column!r} holds {feature}.")
    labels = splits["train"].unique("label")
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"Column {column!r} must hold whole numbers from 0 or class labels, but holds {labels[:3]}.")
    return [str(label) for label in range(max(labels) + 1)]


class LabelledImages(torch.utils.data.Dataset):
    """Reads images as RGB, applies ``transform`` and names what cannot be read.

    Args:
        rows: A data set with the columns ``image`` (encoded) and ``label``.
        transform: From a PIL image to a tensor ``(3, height, width)``.
    """

    def __init__(self, rows: Dataset, transform):
        self.rows = rows
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _read(self.rows[index], self.transform)


def labelled_images(rows: Dataset | IterableDataset, transform, *, num_rows: int | None = None, buffer_size: int = 1):
    """Return what :class:`LabelledImages` gives, as a stream if the rows are one."""
    if not isinstance(rows, IterableDataset):
        return LabelledImages(rows, transform)
    splits = rows.info.splits or {}
    known = splits[rows.split].num_examples if rows.split in splits else None

    read = partial(_read, transform=transform)
    return SeededStream(rows, read, _encoded, num_rows=num_rows or known, buffer_size=buffer_size)


def _read(row: dict[str, Any], transform) -> dict[str, Any]:
    image, label = read_row(row)
    return {"pixel_values": transform(image), "labels": label}


def _encoded(row: dict[str, Any]) -> bytes:
    return row["image"]["bytes"] or row["image"]["path"].encode()


def read_row(row: dict[str, Any]) -> tuple[PILImage.Image, int]:
    """Return the image as RGB and its label."""
    return read_image(row["image"]), row["label"]


def read_image(encoded: dict[str, Any] | None) -> PILImage.Image:
    """Decode an image as RGB, whatever its mode; of an animation the first frame.

    Raises:
        ValueError: If it is no image, is cut off, or has more than 179 million pixels, which Pillow takes for an
            attack; names the file where there is one.
    """
    if encoded is None:
        raise ValueError("the row holds no image.")
    source = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
    try:
        return as_rgb(PILImage.open(source))
    except Exception as error:  # Pillow's decoders raise all kinds
        raise ValueError(f"{encoded['path'] or 'an embedded image'} is no readable image ({error}).") from error


def as_rgb(image: PILImage.Image) -> PILImage.Image:
    """Convert an image of any mode; 16 bits are scaled to 8, where Pillow would clip them."""
    if image.mode.startswith("I"):
        image = PILImage.fromarray((np.asarray(image).clip(0, 65535) // 257).astype("uint8"))
    return image.convert("RGB")


def leave_out_bad_images(rows: Dataset, read: Callable[[Any], Any], limit: int, num_workers: int = 0) -> Dataset:
    """Leave out the rows of a training split that cannot be read, and list them.

    Every image is read once, before training, so that the count holds for all workers, processes and epochs together,
    and the order of the others does not depend on when a bad one is met. ``datasets`` remembers the result.

    Args:
        rows: The split.
        read: Reads a row, or raises.
        limit: How many may be left out.
        num_workers: Processes to read with.

    Raises:
        ValueError: If more rows than ``limit`` cannot be read.
    """
    faults = rows.map(
        partial(_find_fault, read=read),
        num_proc=num_workers or None,
        remove_columns=rows.column_names,
        desc="Looking for bad images",
    )["fault"]
    bad = {index: fault for index, fault in enumerate(faults) if fault}
    listed = "".join(f"\n  row {index}: {fault}" for index, fault in bad.items())
    if len(bad) > limit:
        raise ValueError(f"{len(bad)} training images cannot be read, but --skip_bad_images is {limit}:{listed}")
    if bad and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
        print(f"--skip_bad_images: left out {len(bad)} of {len(rows)} training images:{listed}", flush=True)
    return rows.select([index for index, fault in enumerate(faults) if not fault])


def _find_fault(row: Any, read: Callable[[Any], Any]) -> dict[str, str]:
    try:
        read(row)
    except Exception as error:  # whatever it is, the image cannot be trained on
        return {"fault": str(error) or type(error).__name__}
    return {"fault": ""}


def training_transform(arguments: DataArguments, data_config: dict[str, Any]) -> v2.Compose:
    """Return crop, flip and what else was asked for; the trainer normalises the whole numbers that come out."""
    policies = {
        None: [],
        "autoaugment": [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
        "randaugment": [v2.RandAugment()],
    }
    if arguments.auto_augment not in policies:
        raise ValueError(f"--auto_augment takes autoaugment or randaugment, but got {arguments.auto_augment!r}.")
    size, interpolation = arguments.image_size, InterpolationMode(data_config["interpolation"])
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
    """Return mixup, cutmix or a choice of both for whole batches; ``None`` if neither was asked for."""
    transforms = []
    if arguments.mixup:
        transforms.append(v2.MixUp(alpha=arguments.mixup, num_classes=num_classes))
    if arguments.cutmix:
        transforms.append(v2.CutMix(alpha=arguments.cutmix, num_classes=num_classes))
    return v2.RandomChoice(transforms) if transforms else None
