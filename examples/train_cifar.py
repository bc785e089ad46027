"""Train a multi-exit image classifier by self-distillation.

    accelerate launch examples/train_cifar.py --output_dir runs/eed                        # EED's recipe on CIFAR-100
    accelerate launch examples/train_cifar.py --dataset digits --preset smoke --output_dir runs/smoke

The defaults are the recipe of EED: 200 epochs, SGD 0.9, weight decay 5e-4, learning rate 0.1 divided by 10 after 75,
130 and 180, batches of 128. Those of the other papers are in the README. Every option of transformers'
`TrainingArguments` is there too (`--bf16`, `--push_to_hub`, `--report_to`, `--torch_compile`, ...).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from data import (
    DataArguments,
    card_facts,
    labelled_images,
    load_images,
    mixing_transform,
    training_transform,
)
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, set_seed

from hf_selfkd import MultiExitForImageClassification, SelfDistillationTrainer, exit_costs, get_method
from hf_selfkd.evaluation.curves import to_table
from hf_selfkd.model_card import exit_rows
from hf_selfkd.training.checkpoints import find_last_checkpoint

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
class ModelArguments:
    """The network and how it teaches itself."""

    backbone: str = field(default="resnet18", metadata={"help": "Any timm model."})
    backbone_kwargs: str = field(default="{}", metadata={"help": "JSON, passed to timm.create_model."})
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's weights."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the exits only."})
    small_input_stem: bool = field(default=True, metadata={"help": "3x3 stride-1 stem, for images of 32 pixels."})
    exits: str | None = field(default=None, metadata={"help": "JSON list of stages. Default: chosen by the model."})
    exit_width: int | None = field(default=None, metadata={"help": "Default: the width of the pre-logits."})
    method: str = field(default="eed", metadata={"help": "byot, deep_supervision, eed, none, ..."})
    method_args: str = field(default="{}", metadata={"help": "JSON, such as '{\"alpha\": 0.3}'."})
    lr_milestones: list[float] = field(
        default_factory=lambda: [75, 130, 180], metadata={"help": "Epochs after which the learning rate drops."}
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of the learning rate at each milestone."})
    decay_norms: bool = field(default=True, metadata={"help": "Weight decay on norms and biases too."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of a moving average of the weights."})
    channels_last: bool = field(default=True, metadata={"help": "Memory format; with bf16 about half the time."})
    preset: str | None = field(default=None, metadata={"help": f"Other defaults: {', '.join(PRESETS)}."})


@dataclass
class Recipe(TrainingArguments):
    """Transformers' arguments with the recipe of EED as defaults."""

    num_train_epochs: float = 200
    learning_rate: float = 0.1
    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9"
    weight_decay: float = 5e-4
    max_grad_norm: float = 0.0
    per_device_train_batch_size: int = 128
    per_device_eval_batch_size: int = 500
    remove_unused_columns: bool = False
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 1
    logging_strategy: str = "epoch"


class EpochTable(TrainerCallback):
    """Prints a row with the accuracy of every exit after each evaluation."""

    def __init__(self):
        self.header_is_due = True

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Print the row."""
        names = [name for name in metrics if name.startswith("eval_accuracy_")]
        if state.is_world_process_zero and self.header_is_due:
            print("".join(f"{name.removeprefix('eval_accuracy_'):>10}" for name in ["epoch", "loss", *names]))
            self.header_is_due = False
        if state.is_world_process_zero:
            accuracies = "".join(f"{100 * metrics[name]:10.2f}" for name in names)
            print(f"{state.epoch or 0:10.1f}{metrics['eval_loss']:10.4f}{accuracies}", flush=True)


def parse(kinds=(ModelArguments, DataArguments, Recipe)) -> tuple[ModelArguments, DataArguments, Recipe]:
    parser = HfArgumentParser(kinds)
    preset = parser.parse_known_args()[0].preset
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}. Available: {', '.join(PRESETS)}.")
    parser.set_defaults(**PRESETS.get(preset, {}))
    return parser.parse_args_into_dataclasses()


def parse_json(name: str, text: str | None, kind: type) -> Any:
    try:
        value = None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} is not JSON: {text}") from error
    if not isinstance(value, (kind, type(None))):
        raise ValueError(f"--{name} must be a JSON {kind.__name__}, but got {text}.")
    return value


def find_checkpoint(args: TrainingArguments) -> str | None:
    """Return where to go on from, and refuse to write over another run."""
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume in ("last", "true", "True"):
        found = find_last_checkpoint(args.output_dir) if folder.is_dir() else None
        if found is None and (folder / "model.safetensors").exists():
            raise ValueError(
                f"{folder} holds a trained model but no checkpoint to go on from. Give another --output_dir."
            )
        return found
    if resume is not None:
        if not Path(resume).is_dir():
            raise ValueError(f"--resume_from_checkpoint takes last or the folder of a checkpoint, but got {resume!r}.")
        return resume
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} already holds a run. Go on with --resume_from_checkpoint last, or give another --output_dir."
        )
    return None


def build_model(options: ModelArguments, data: DataArguments, class_names: list[str]):
    model = MultiExitForImageClassification.from_backbone(
        options.backbone,
        pretrained=options.pretrained,
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        backbone_kwargs=parse_json("backbone_kwargs", options.backbone_kwargs, dict),
        small_input_stem=options.small_input_stem,
        exits=parse_json("exits", options.exits, list),
        exit_width=options.exit_width,
    )
    channels = model.config.pretrained_cfg["input_size"][0]
    if channels != 3:
        raise ValueError(f"Images are read as RGB, but the backbone takes {channels} channels. Leave out in_chans.")
    model.config.pretrained_cfg |= {"input_size": [3, data.image_size, data.image_size], "crop_pct": data.crop_pct}
    if not options.pretrained:
        model.config.pretrained_cfg |= {"mean": data.mean, "std": data.std}
    if options.freeze_backbone:
        model.freeze_backbone()
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


def main(*kinds: type):
    options, data, args = parse(*([kinds] if kinds else []))
    checkpoint = find_checkpoint(args)
    method = get_method(options.method, **parse_json("method_args", options.method_args, dict))
    with args.main_process_first(desc="data"):  # the others find what it has fetched and read
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
        card=card_facts(data),
        callbacks=[EpochTable()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        print(f"\n{to_table(exit_rows(model, metrics, exit_costs(model)))}\n\nSaved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
