"""Train a multi-exit model for semantic segmentation by self-distillation.

    accelerate launch examples/train_segmentation.py --dataset path/to/folder --output_dir runs/frskd

The dataset is a folder that `datasets.load_dataset` reads (such as parquet files) or a repository on the Hub, with a
column of images and one of label maps (8-bit or palette images of class indices). The defaults are FRSKD's recipe: 60
epochs, SGD 0.9, weight decay 5e-4, learning rate 0.01 divided by 10 after 40, batches of 32, but without its clipping
of gradients by value. Every option of transformers' `TrainingArguments` works too. After training, `pictures/` in the
output folder shows images of the evaluation split next to their labels and predictions.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from common import (
    CARD_EXTRAS,
    TRAINER_OPTIONS,
    NetworkArguments,
    Recipe,
    find_checkpoint,
    parse_json,
    parse_options,
    train_and_save,
)
from common import build_model as build
from data import SplitArguments, as_rgb, choose_splits, leave_out_bad_images, limit_samples
from datasets import Image, load_dataset
from overview import print_overview
from PIL import Image as PILImage
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import HfArgumentParser, set_seed

from hf_selfkd import MultiExitForSemanticSegmentation, SelfDistillationTrainer, get_method
from hf_selfkd.evaluation import to_table
from hf_selfkd.model_card import exit_rows

EVALUATION_SPLITS = ("validation", "valid", "val", "test")


@dataclass
class SegmentationModel(NetworkArguments):
    """Options of network and method."""

    backbone: str = field(default="efficientnet_b0", metadata={"help": "Any hierarchical timm model."})
    pyramid_width: int = field(default=64, metadata={"help": "Channels of the feature pyramid."})
    method: str = field(default="frskd", metadata={"help": "frskd, deep_supervision or none."})
    method_args: str = field(default="{}", metadata={"help": "JSON, such as '{\"beta\": 50}'."})
    lr_milestones: list[float] = field(
        default_factory=lambda: [40], metadata={"help": "Epochs after which the learning rate is divided by 10."}
    )


@dataclass
class SegmentationData(SplitArguments):
    """Dataset and augmentation."""

    image_column: str = field(default="image", metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of label maps."})
    evaluation_split: str | None = field(default=None, metadata={"help": "Default: validation, else test."})
    class_names: str | None = field(
        default=None,
        metadata={"help": 'JSON list. Default: "0", "1", ... up to the largest in training.'},
    )
    ignore_index: int = field(default=255, metadata={"help": "Class index of ignored pixels."})
    image_size: list[int] = field(default_factory=lambda: [512, 512], metadata={"help": "Height and width in pixels."})
    crop_size: list[int] | None = field(default=None, metadata={"help": "Of training crops. Default: image_size."})
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0], metadata={"help": "Range of the random scale before the crop."}
    )
    blur: float = field(default=0.5, metadata={"help": "Probability of a slight Gaussian blur."})
    num_pictures: int = field(default=4, metadata={"help": "Images to show after training."})


@dataclass
class SegmentationRecipe(Recipe):
    """TrainingArguments with the recipe of FRSKD as defaults."""

    num_train_epochs: float = 60
    learning_rate: float = 0.01
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 2
    per_device_eval_batch_size: int = 16


class LabelledMaps(torch.utils.data.Dataset):
    """Images and their label maps, transformed together.

    Args:
        rows: A dataset with the columns ``image`` and ``label``.
        transform: From an image and a mask of torchvision's to both, the image normalised.
    """

    def __init__(self, rows, transform):
        self.rows = rows
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image, label = read_row(row)
        if (image.height, image.width) != label.shape:
            height, width = label.shape
            raise ValueError(f"the image has {image.height}x{image.width} pixels, but its label map {height}x{width}.")
        image, label = self.transform(tv_tensors.Image(v2.functional.pil_to_tensor(image)), tv_tensors.Mask(label))
        return {"pixel_values": image.as_subclass(torch.Tensor), "labels": label.as_subclass(torch.Tensor)}


def read_row(row: dict[str, Any]) -> tuple[PILImage.Image, torch.Tensor]:
    """Return the image as RGB and its label map."""
    return as_rgb(row["image"]), label_map(row["label"])


def label_map(image: PILImage.Image) -> torch.Tensor:
    """Read a map of class indices, ``(height, width)``."""
    indices = np.array(image)
    if indices.ndim != 2:
        raise ValueError(f"a label map must hold one class index per pixel, but is an image of mode {image.mode}.")
    return torch.from_numpy(indices.astype(np.int64))


def load_maps(options: SegmentationData, num_workers: int = 0):
    """Load the splits for training and evaluation, and the names of the classes."""
    splits = limit_samples(choose_splits(load_dataset(options.dataset), options, EVALUATION_SPLITS), options)
    names = {options.image_column: "image", options.label_column: "label"}
    for name, split in splits.items():
        for column in names:
            if not isinstance(split.features.get(column), Image):
                raise ValueError(f"{column!r} is not a column of images. Columns: {', '.join(split.features)}.")
        splits[name] = split.select_columns(list(names)).rename_columns(names)
    if options.skip_bad_images:
        splits["train"] = leave_out_bad_images(splits["train"], read_row, options.skip_bad_images, num_workers)
    class_names = parse_json("class_names", options.class_names, list)
    return splits["train"], splits["test"], class_names or number_classes(splits["train"], options.ignore_index)


def number_classes(rows, ignore_index: int) -> list[str]:
    """Return ``"0"``, ``"1"``, ... up to the largest class index in the label maps."""
    classes = {index for row in rows for index in label_map(row["label"]).unique().tolist()}
    return [str(index) for index in range(max(classes - {ignore_index}) + 1)]


def transforms(options: SegmentationData, data_config: dict[str, Any]) -> tuple[v2.Compose, v2.Compose]:
    """Return the transform of training, which moves image and map together, and that of evaluation."""
    size, crop = options.image_size, options.crop_size or options.image_size
    resize = v2.Resize(size, v2.InterpolationMode(data_config["interpolation"]), antialias=True)
    normalise = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    normalise.append(v2.Normalize(data_config["mean"], data_config["std"]))
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: options.ignore_index}
    training = [
        v2.ScaleJitter(size, tuple(options.scale_range)),
        v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(0.5 if options.horizontal_flip else 0.0),
        v2.RandomApply([v2.GaussianBlur(5)], options.blur),
    ]
    return v2.Compose([*training, *normalise]), v2.Compose([resize, *normalise])


def palette(num_classes: int) -> np.ndarray:
    """Return PASCAL VOC's colour of each class, then black for ignored pixels, ``(classes + 1, 3)``."""
    colours = np.zeros((num_classes + 1, 3), dtype=np.uint8)
    for index in range(num_classes):
        bits = index + 1  # 0 is black
        for shift in range(7, 4, -1):
            for channel in range(3):
                colours[index, channel] |= (bits >> channel & 1) << shift
            bits >>= 3
    return colours


@torch.no_grad()
def save_pictures(model, rows, folder: Path, ignore_index: int) -> None:
    """Save each image, its label map and the prediction side by side, in the size of the original."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = model.create_image_processor()
    classes = model.config.num_labels
    colours = palette(classes)
    for index, row in enumerate(rows):
        image, label = read_row(row)
        label = label.numpy()
        inputs = processor(image, return_tensors="pt").to(model.device)
        predicted = processor.post_process_semantic_segmentation(model(**inputs), [label.shape])[0].cpu().numpy()
        ignored = label == ignore_index
        maps = [colours[np.where(ignored, classes, indices)] for indices in (label, predicted)]
        panels = [np.array(image), *maps]
        PILImage.fromarray(np.concatenate(panels, axis=1)).save(folder / f"{index}.png")


def describe_data(options: SegmentationData) -> dict[str, Any]:
    """Return name and augmentation of the data, for the model card."""
    augmentation = ("crop_size", "scale_range", "horizontal_flip", "blur")
    recipe = {name: getattr(options, name) for name in augmentation if getattr(options, name)}
    if Path(options.dataset).is_dir():
        return {"dataset": Path(options.dataset).resolve().name, "recipe": recipe}
    return {"dataset": options.dataset, "dataset_tags": options.dataset, "recipe": recipe}


def build_model(options: SegmentationModel, data: SegmentationData, class_names: list[str]):
    config = {"pyramid_width": options.pyramid_width, "semantic_loss_ignore_index": data.ignore_index}
    model = build(MultiExitForSemanticSegmentation, options, class_names, **config)
    model.config.pretrained_cfg |= {"input_size": [3, *data.image_size]}
    return model


def main(argv: list[str] | None = None):
    parser = HfArgumentParser((SegmentationModel, SegmentationData, SegmentationRecipe))
    options, data, args = parse_options(parser, argv)
    checkpoint = find_checkpoint(args)
    method = get_method(options.method, **parse_json("method_args", options.method_args, dict))
    with args.main_process_first(desc="data"):  # the others use its download and caches
        train_rows, eval_rows, class_names = load_maps(data, args.dataloader_num_workers)
    set_seed(args.seed)
    model = build_model(options, data, class_names)
    train_transform, eval_transform = transforms(data, timm.data.resolve_data_config(model.config.pretrained_cfg))
    trainer = SelfDistillationTrainer(
        model,
        args,
        method,
        train_dataset=LabelledMaps(train_rows, train_transform),
        eval_dataset=LabelledMaps(eval_rows, eval_transform),
        lr_milestones=options.lr_milestones,
        decay_norms=True,
        card=describe_data(data) | CARD_EXTRAS,
        **TRAINER_OPTIONS,
    )
    if trainer.is_world_process_zero():
        print_overview(trainer, {"train": train_rows, "test": eval_rows})
    metrics = train_and_save(trainer, checkpoint, "mean_iou")
    if trainer.is_world_process_zero():
        shown = eval_rows.select(range(0, len(eval_rows), max(1, len(eval_rows) // max(1, data.num_pictures))))
        shown = shown.select(range(min(data.num_pictures, len(shown))))
        save_pictures(model.eval(), shown, Path(args.output_dir) / "pictures", data.ignore_index)
        print(f"\n{to_table(exit_rows(model, metrics))}\n\nSaved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
