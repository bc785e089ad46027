"""Train a multi-exit image classifier by self-distillation.

    accelerate launch examples/train_cifar.py --output_dir runs/eed                        # EED's recipe on CIFAR-100
    accelerate launch examples/train_cifar.py --dataset digits --preset smoke --output_dir runs/smoke

The defaults are the recipe of EED: 200 epochs, SGD 0.9, weight decay 5e-4, learning rate 0.1 divided by 10 after 75,
130 and 180, batches of 128. The recipes of the other papers are in docs/recipes.md. Every option of transformers'
`TrainingArguments` works too (`--bf16`, `--push_to_hub`, `--report_to`, `--torch_compile`, ...).
"""

from dataclasses import dataclass, field

import timm
from common import CARD_EXTRAS, TRAINER_OPTIONS, NetworkArguments, Recipe, find_checkpoint, parse_json, train_and_save
from common import build_model as build
from data import DataArguments, describe_data, labelled_images, load_images, mixing_transform, training_transform
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

    freeze_backbone: bool = field(default=False, metadata={"help": "Train the exits only."})
    small_input_stem: bool = field(default=True, metadata={"help": "3x3 stride-1 stem, for images of 32 pixels."})
    exit_width: int | None = field(default=None, metadata={"help": "Default: the width of the pre-logits."})
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of the learning rate at each milestone."})
    decay_norms: bool = field(default=True, metadata={"help": "Weight decay on norms and biases too."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of a moving average of the weights."})
    preset: str | None = field(default=None, metadata={"help": f"Other defaults: {', '.join(PRESETS)}."})


def parse(argv=None, kinds=(ModelArguments, DataArguments, Recipe)) -> tuple[ModelArguments, DataArguments, Recipe]:
    parser = HfArgumentParser(kinds)
    preset = parser.parse_known_args(argv)[0].preset
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}. Available: {', '.join(PRESETS)}.")
    parser.set_defaults(**PRESETS.get(preset, {}))
    return parser.parse_args_into_dataclasses(argv)


def build_model(options: ModelArguments, data: DataArguments, class_names: list[str]):
    config = {"small_input_stem": options.small_input_stem, "exit_width": options.exit_width}
    model = build(MultiExitForImageClassification, options, class_names, **config)
    channels = model.config.pretrained_cfg["input_size"][0]
    if channels != 3:
        raise ValueError(f"Images are read as RGB, but the backbone takes {channels} channels. Remove in_chans.")
    model.config.pretrained_cfg |= {"input_size": [3, data.image_size, data.image_size], "crop_pct": data.crop_pct}
    if not options.pretrained:
        model.config.pretrained_cfg |= {"mean": data.mean, "std": data.std}
    if options.freeze_backbone:
        model.freeze_backbone()
    return model


def main(argv: list[str] | None = None, kinds=(ModelArguments, DataArguments, Recipe)):
    options, data, args = parse(argv, kinds)
    checkpoint = find_checkpoint(args)
    method = get_method(options.method, **parse_json("method_args", options.method_args, dict))
    with args.main_process_first(desc="data"):  # the others use its download and caches
        images, class_names = load_images(data, args.dataloader_num_workers)
    set_seed(args.seed)
    model = build_model(options, data, class_names)
    data_config = timm.data.resolve_data_config(model.config.pretrained_cfg)
    stream = {"num_rows": data.num_train_images, "buffer_size": data.shuffle_buffer}
    trainer = SelfDistillationTrainer(
        model,
        args,
        method,
        train_dataset=labelled_images(images["train"], training_transform(data, data_config), **stream),
        eval_dataset=labelled_images(images["test"], timm.data.create_transform(**data_config)),
        mix=mixing_transform(data, len(class_names)),
        lr_milestones=options.lr_milestones,
        lr_gamma=options.lr_gamma,
        decay_norms=options.decay_norms,
        ema_decay=options.ema_decay,
        card=describe_data(data) | CARD_EXTRAS,
        **TRAINER_OPTIONS,
    )
    metrics = train_and_save(trainer, checkpoint, "accuracy")
    if trainer.is_world_process_zero():
        print(f"\n{to_table(exit_rows(model, metrics, exit_costs(model)))}\n\nSaved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
