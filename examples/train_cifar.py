"""Train a multi-exit image classifier by self-distillation.

    accelerate launch examples/train_cifar.py --output_dir runs/eed                        # EED's recipe on CIFAR-100
    accelerate launch examples/train_cifar.py --dataset digits --preset smoke --output_dir runs/smoke
    accelerate launch examples/train_cifar.py --dataset path/to/photos --backbone convnext_atto --pretrained true \
        --output_dir runs/photos

For small images the defaults are the recipe of EED (`--recipe cifar`): 200 epochs, SGD 0.9, weight decay 5e-4,
learning rate 0.1 divided by 10 after 75, 130 and 180, batches of 128. For larger ones (`--recipe photos`) they follow
the backbone: its image size, random resized crops, AdamW, or SGD for ResNets, warm-up, cosine, clipping, 20 epochs.
These recipes by family and those of the other papers are in docs/recipes.md. Every option of transformers'
`TrainingArguments` works too (`--bf16`, `--push_to_hub`, `--report_to`, `--torch_compile`, ...).
"""

import json
from dataclasses import dataclass, field, replace

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
from data import DataArguments, describe_data, labelled_images, load_images, mixing_transform, training_transform
from overview import print_overview
from recipes import choose_recipe, recipe_defaults
from torchvision.transforms import v2
from transformers import HfArgumentParser, set_seed

from hf_selfkd import MultiExitForImageClassification, SelfDistillationTrainer, exit_costs, get_method
from hf_selfkd.evaluation import to_table
from hf_selfkd.model_card import exit_rows

PRESETS = {
    "smoke": {
        "backbone_kwargs": '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}',
        "num_train_epochs": 6,
        "per_device_train_batch_size": 32,
        "learning_rate": 0.1,
        "lr_milestones": [5],
        "horizontal_flip": False,
    }
}


@dataclass
class ModelArguments(NetworkArguments):
    """Options of network and method."""

    recipe: str | None = field(
        default="auto", metadata={"help": "Defaults for small images (cifar), larger ones (photos) or as the data is."}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train exits only, the final one if new."})
    small_input_stem: bool = field(default=True, metadata={"help": "3x3 stride-1 stem, for images of 32 pixels."})
    exit_width: int | None = field(default=None, metadata={"help": "Default: the width of the pre-logits."})
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of the learning rate at each milestone."})
    decay_norms: bool = field(default=True, metadata={"help": "Weight decay on norms and biases too."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of a moving average of the weights."})
    preset: str | None = field(default=None, metadata={"help": f"Other defaults: {', '.join(PRESETS)}."})


def parse(argv=None, kinds=(ModelArguments, DataArguments, Recipe)) -> tuple[ModelArguments, DataArguments, Recipe]:
    parser = HfArgumentParser(kinds)
    given = parser.parse_known_args(argv)[0]
    if given.preset is not None and given.preset not in PRESETS:
        raise ValueError(f"Unknown preset {given.preset!r}. Available: {', '.join(PRESETS)}.")
    recipe = choose_recipe(given)
    parser.set_defaults(**recipe_defaults(recipe, given) | PRESETS.get(given.preset, {}))
    options, data, args = parse_options(parser, argv)
    return replace(options, recipe=recipe), data, args


def build_model(options: ModelArguments, data: DataArguments, class_names: list[str]):
    config = {"small_input_stem": options.small_input_stem, "exit_width": options.exit_width}
    model = build(MultiExitForImageClassification, options, class_names, **config)
    settings, channels = model.config.pretrained_cfg, model.num_channels
    if channels not in (1, 3):
        raise ValueError(f"Images are read as RGB or grey, but the backbone takes {channels} channels.")
    size = data.image_size or max(settings["input_size"][1:])
    settings |= {"input_size": [channels, size, size]}
    if data.crop_pct is not None:
        settings |= {"crop_pct": data.crop_pct}
    for name, values in (("mean", data.mean), ("std", data.std)):
        if not options.pretrained and values is not None:
            settings[name] = values if channels == 3 else [sum(values) / len(values)]
    if options.freeze_backbone:
        model.freeze_backbone()
        if options.pretrained and model.backbone.pretrained_cfg.get("num_classes") != len(class_names):
            for classifier in model.classifiers:  # newly initialised, for other classes than those of the weights
                classifier.requires_grad_(True)
    return model


def check_image_size(options: ModelArguments, data: DataArguments) -> None:
    """Raise ValueError if the backbone does not take images of this size, before any of them is read."""
    kwargs = parse_json("backbone_kwargs", options.backbone_kwargs, dict)
    kwargs.pop("checkpoint_path", None)  # no weights are needed
    options = replace(options, backbone_kwargs=json.dumps(kwargs), pretrained=False, channels_last=False)
    with torch.device("meta"):  # takes neither memory nor time
        model = build_model(options, data, ["0", "1"]).eval()
        shape = model.config.pretrained_cfg["input_size"]
        try:
            model(torch.empty(1, *shape))
        except Exception as error:  # networks for one size fail in many ways
            own = model.backbone.pretrained_cfg["input_size"]
            raise ValueError(
                f"{options.backbone} does not take images of {shape[1]}x{shape[2]} pixels. Use --image_size "
                f"{own[-1]}, or build it for these with --backbone_kwargs '{{\"img_size\": {shape[1]}}}'. ({error})"
            ) from error


def main(argv: list[str] | None = None, kinds=(ModelArguments, DataArguments, Recipe)):
    options, data, args = parse(argv, kinds)
    checkpoint = find_checkpoint(args)
    method = get_method(options.method, **parse_json("method_args", options.method_args, dict))
    check_image_size(options, data)
    with args.main_process_first(desc="data"):  # the others use its download and caches
        images, class_names = load_images(data, args.dataloader_num_workers)
    set_seed(args.seed)
    model = build_model(options, data, class_names)
    data_config = timm.data.resolve_data_config(model.config.pretrained_cfg)
    transforms = training_transform(data, data_config), timm.data.create_transform(**data_config)
    if model.num_channels == 1:
        transforms = [v2.Compose([v2.Grayscale(), transform]) for transform in transforms]
    stream = {"num_rows": data.num_train_images, "buffer_size": data.shuffle_buffer}
    trainer = SelfDistillationTrainer(
        model,
        args,
        method,
        train_dataset=labelled_images(images["train"], transforms[0], **stream),
        eval_dataset=labelled_images(images["test"], transforms[1]),
        mix=mixing_transform(data, len(class_names)),
        lr_milestones=options.lr_milestones,
        lr_gamma=options.lr_gamma,
        decay_norms=options.decay_norms,
        ema_decay=options.ema_decay,
        card=describe_data(data) | CARD_EXTRAS,
        **TRAINER_OPTIONS,
    )
    if trainer.is_world_process_zero():
        print_overview(trainer, images, options.recipe)
    metrics = train_and_save(trainer, checkpoint, "accuracy")
    if trainer.is_world_process_zero():
        print(f"\n{to_table(exit_rows(model, metrics, exit_costs(model)))}\n\nSaved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
