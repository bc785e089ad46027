r"""Train a multi-exit image classifier on ImageNet-1k by self-distillation.

    accelerate launch --config_file examples/accelerate/one_machine.yaml examples/train_imagenet.py \
        --streaming true --dataloader_num_workers 8 --bf16 true --output_dir runs/imagenet         # from the Hub
    accelerate launch examples/train_imagenet.py --dataset path/to/imagenet --output_dir runs/imagenet

A local `--dataset` is a folder with `train` and `val`, each with one folder of JPEGs per class. `--streaming true`
stores nothing: processes and workers share the shards, in a new order every epoch, and an interrupted run resumes
mid-epoch. The length of a streamed folder is unknown: set `--num_train_images` or `--max_steps`.

The defaults are LSH's recipe for ImageNet, which is the usual one for ResNets: 100 epochs, SGD 0.9, weight decay 1e-4,
learning rate 0.1 divided by 10 after 30, 60 and 90, a global batch of 256 (divide `--per_device_train_batch_size` by
the number of processes), random resized crops of 224 pixels. The options are those of `train_cifar.py`.
"""

from dataclasses import dataclass, field

from common import Recipe
from data import DataArguments
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from train_cifar import ModelArguments
from train_cifar import main as train


@dataclass
class ImageNetModel(ModelArguments):
    """Options of network and method, for large images."""

    recipe: str | None = field(default=None, metadata={"help": "Default: that of this script; or as train_cifar.py."})
    small_input_stem: bool = field(default=False, metadata={"help": "3x3 stride-1 stem, for images of 32 pixels."})
    lr_milestones: list[float] = field(
        default_factory=lambda: [30, 60, 90], metadata={"help": "Epochs after which the learning rate drops."}
    )


@dataclass
class ImageNetData(DataArguments):
    """ImageNet-1k with the usual augmentation."""

    dataset: str = field(default="imagenet-1k", metadata={"help": "imagenet-1k from the Hub, or a folder."})
    evaluation_split: str | None = "validation"
    image_size: int = 224
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_DEFAULT_MEAN))
    std: list[float] = field(default_factory=lambda: list(IMAGENET_DEFAULT_STD))
    crop_pct: float = 224 / 256
    crop_scale: float | None = 0.08


@dataclass
class ImageNetRecipe(Recipe):
    """TrainingArguments with the recipe for ImageNet as defaults."""

    num_train_epochs: float = 100
    weight_decay: float = 1e-4
    per_device_train_batch_size: int = 256


def main(argv: list[str] | None = None):
    train(argv, (ImageNetModel, ImageNetData, ImageNetRecipe))


if __name__ == "__main__":
    main()
