"""Train a multi-exit model for semantic segmentation by self-distillation.

    accelerate launch examples/train_segmentation.py --dataset path/to/folder --output_dir runs/frskd

The data set is a folder that `datasets.load_dataset` reads (such as parquet files) or a repository on the Hub, with a
column of images and one of label maps (8-bit or palette images of class indices). The defaults are FRSKD's recipe: 60
epochs, SGD 0.9, weight decay 5e-4, learning rate 0.01 divided by 10 after 40, batches of 32; its clipping of gradients
by value is left out. Every option of transformers' `TrainingArguments` is there too. At the end `pictures/` in the
output folder shows images of the evaluation split, their labels and the model's answers side by side.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from data import as_rgb, leave_out_bad_images
from datasets import Image, load_dataset
from PIL import Image as PILImage
from torchvision import tv_tensors
from torchvision.transforms import v2
from train_cifar import Recipe, find_checkpoint, parse_json
from transformers import HfArgumentParser, set_seed

from hf_selfkd import MultiExitForSemanticSegmentation, SelfDistillationTrainer, get_method

EVALUATION_SPLITS = ("validation", "valid", "val", "test")


@dataclass
class Options:
    """Data, network and method."""

    dataset: str = field(metadata={"help": "A folder that load_dataset reads, or a repository on the Hub."})
    image_column: str = field(default="image", metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of label maps."})
    class_names: str | None = field(
        default=None,
        metadata={"help": 'JSON list. Default: "0", "1", ... up to the largest in training.'},
    )
    ignore_index: int = field(default=255, metadata={"help": "Class of void pixels."})
    evaluation_split: str | None = field(default=None, metadata={"help": "Default: validation, else test."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many images only."})
    skip_bad_images: int = field(
        default=0,
        metadata={"help": "Leave out up to so many training rows that cannot be read; all are read once before."},
    )
    image_size: list[int] = field(default_factory=lambda: [512, 512], metadata={"help": "Height and width in pixels."})
    crop_size: list[int] | None = field(default=None, metadata={"help": "Of training crops. Default: image_size."})
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0], metadata={"help": "Range of the random scale before the crop."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror half of the images."})
    blur: float = field(default=0.5, metadata={"help": "Probability of a slight Gaussian blur."})
    backbone: str = field(default="efficientnet_b0", metadata={"help": "Any hierarchical timm model."})
    backbone_kwargs: str = field(default="{}", metadata={"help": "JSON, passed to timm.create_model."})
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's weights."})
    pyramid_width: int = field(default=64, metadata={"help": "Channels of the feature pyramid."})
    exits: str | None = field(default=None, metadata={"help": "JSON list of stages. Default: chosen by the model."})
    method: str = field(default="frskd", metadata={"help": "frskd, deep_supervision or none."})
    method_args: str = field(default="{}", metadata={"help": "JSON, such as '{\"beta\": 50}'."})
    lr_milestones: list[float] = field(
        default_factory=lambda: [40], metadata={"help": "Epochs after which the learning rate is divided by 10."}
    )
    channels_last: bool = field(default=True, metadata={"help": "Memory format; faster convolutions."})
    num_pictures: int = field(default=4, metadata={"help": "Images to show at the end."})


@dataclass
class SegmentationRecipe(Recipe):
    """Transformers' arguments with the recipe of FRSKD as defaults."""

    num_train_epochs: float = 60
    learning_rate: float = 0.01
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 2
    per_device_eval_batch_size: int = 16


class LabelledMaps(torch.utils.data.Dataset):
    """Images and their label maps, transformed together.

    Args:
        rows: A data set with the columns ``image`` and ``label``.
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


def load_maps(options: Options, num_workers: int = 0):
    """Load the splits for training and evaluation, and the names of the classes."""
    splits = load_dataset(options.dataset)
    wanted = [options.evaluation_split] if options.evaluation_split else EVALUATION_SPLITS
    evaluation = next((name for name in wanted if name in splits), None)
    if "train" not in splits or evaluation is None:
        raise ValueError(
            f"{options.dataset} has the splits {', '.join(splits)}, but train and one of {', '.join(wanted)} are "
            "needed."
        )
    chosen = []
    limits = (options.max_train_samples, options.max_eval_samples)
    for split, limit in zip((splits["train"], splits[evaluation]), limits, strict=True):
        for column in (options.image_column, options.label_column):
            if not isinstance(split.features.get(column), Image):
                raise ValueError(f"{column!r} is no column of images. Columns: {', '.join(split.features)}.")
        split = split.select(range(min(limit or len(split), len(split))))
        split = split.select_columns([options.image_column, options.label_column])
        chosen.append(split.rename_columns({options.image_column: "image", options.label_column: "label"}))
    if options.skip_bad_images:
        chosen[0] = leave_out_bad_images(chosen[0], read_row, options.skip_bad_images, num_workers)
    names = parse_json("class_names", options.class_names, list)
    if names is None:
        classes = {index for row in chosen[0] for index in label_map(row["label"]).unique().tolist()}
        names = [str(index) for index in range(max(classes - {options.ignore_index}) + 1)]
    return *chosen, names


def transforms(options: Options, data_config: dict[str, Any]) -> tuple[v2.Compose, v2.Compose]:
    """Return what varies image and map together in training, and what evaluation uses."""
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
    """Return a colour per class and black for void behind them, ``(classes + 1, 3)``, as PASCAL VOC chose them."""
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
    """Save images with their label map and the model's answer side by side, in the size of the original."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = model.create_image_processor()
    classes = model.config.num_labels
    colours = palette(classes)
    for index, row in enumerate(rows):
        image, label = read_row(row)
        label = label.numpy()
        inputs = processor(image, return_tensors="pt").to(model.device)
        answer = processor.post_process_semantic_segmentation(model(**inputs), [label.shape])[0].cpu().numpy()
        void = label == ignore_index
        panels = [np.array(image), colours[np.where(void, classes, label)], colours[np.where(void, classes, answer)]]
        PILImage.fromarray(np.concatenate(panels, axis=1)).save(folder / f"{index}.png")


def card_facts(options: Options) -> dict[str, Any]:
    """Return what the model card tells of the data: what it is called, and how it was varied in training."""
    augmentation = ("crop_size", "scale_range", "horizontal_flip", "blur")
    recipe = {name: getattr(options, name) for name in augmentation if getattr(options, name)}
    if Path(options.dataset).is_dir():
        return {"dataset": Path(options.dataset).resolve().name, "recipe": recipe}
    return {"dataset": options.dataset, "dataset_tags": options.dataset, "recipe": recipe}


def build_model(options: Options, class_names: list[str]) -> MultiExitForSemanticSegmentation:
    model = MultiExitForSemanticSegmentation.from_backbone(
        options.backbone,
        pretrained=options.pretrained,
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        backbone_kwargs=parse_json("backbone_kwargs", options.backbone_kwargs, dict),
        pyramid_width=options.pyramid_width,
        exits=parse_json("exits", options.exits, list),
        semantic_loss_ignore_index=options.ignore_index,
    )
    model.config.pretrained_cfg |= {"input_size": [3, *options.image_size]}
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


def main():
    options, args = HfArgumentParser((Options, SegmentationRecipe)).parse_args_into_dataclasses()
    checkpoint = find_checkpoint(args)
    method = get_method(options.method, **parse_json("method_args", options.method_args, dict))
    with args.main_process_first(desc="data"):  # the others find what it has fetched and read
        train_rows, eval_rows, class_names = load_maps(options, args.dataloader_num_workers)
    set_seed(args.seed)
    model = build_model(options, class_names)
    train_transform, eval_transform = transforms(options, timm.data.resolve_data_config(model.config.pretrained_cfg))
    trainer = SelfDistillationTrainer(
        model,
        args,
        method,
        train_dataset=LabelledMaps(train_rows, train_transform),
        eval_dataset=LabelledMaps(eval_rows, eval_transform),
        lr_milestones=options.lr_milestones,
        decay_norms=True,
        card=card_facts(options),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        shown = eval_rows.select(range(0, len(eval_rows), max(1, len(eval_rows) // max(1, options.num_pictures))))
        shown = shown.select(range(min(options.num_pictures, len(shown))))
        save_pictures(model.eval(), shown, Path(args.output_dir) / "pictures", options.ignore_index)
        print(json.dumps({name: round(value, 4) for name, value in metrics.items()}, indent=2))
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
