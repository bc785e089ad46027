"""The parts that the training examples share: options, the model, and the run from checkpoint to saved model."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from hf_selfkd import SelfDistillationTrainer
from hf_selfkd.training import ProgressTable, find_last_checkpoint

# Facts of the model card that take time to collect, in addition to those of the data.
CARD_EXTRAS: dict[str, Any] = {"latency": True, "commit": True}
# Options that every example gives to the trainer.
TRAINER_OPTIONS: dict[str, Any] = {"save_on_sigterm": True}


@dataclass
class NetworkArguments:
    """Options of network and method that classification and segmentation share."""

    backbone: str = field(default="resnet18", metadata={"help": "Any timm model."})
    backbone_kwargs: str = field(default="{}", metadata={"help": "JSON, passed to timm.create_model."})
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's weights."})
    exits: str | None = field(default=None, metadata={"help": "JSON list of stages. Default: chosen by the model."})
    method: str = field(default="eed", metadata={"help": "byot, deep_supervision, eed, none, ..."})
    method_args: str = field(default="{}", metadata={"help": "JSON, such as '{\"alpha\": 0.3}'."})
    lr_milestones: list[float] = field(
        default_factory=lambda: [75, 130, 180],
        metadata={"help": "Epochs after which the learning rate drops. A given --lr_scheduler_type has none."},
    )
    channels_last: bool = field(default=True, metadata={"help": "Memory format; with bf16 about half the time."})


@dataclass
class Recipe(TrainingArguments):
    """TrainingArguments with the recipe of EED as defaults."""

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


def parse_options(parser: HfArgumentParser, argv: list[str] | None) -> tuple:
    """Parse the command line; a given ``--lr_scheduler_type`` takes the place of the recipe's milestones.

    Raises:
        ValueError: If scheduler and milestones are both given.
    """
    names = ("lr_milestones", "lr_scheduler_type")
    defaults = {name: parser.get_default(name) for name in names}
    parser.set_defaults(**dict.fromkeys(names))
    given = parser.parse_known_args(argv)[0]
    if given.lr_scheduler_type is not None and given.lr_milestones is not None:
        raise ValueError(
            "--lr_milestones and --lr_scheduler_type both set the learning rate: the first multiplies it by a factor "
            "after some epochs, the second follows a curve. Give one of them."
        )
    parser.set_defaults(**defaults | ({"lr_milestones": []} if given.lr_scheduler_type is not None else {}))
    return parser.parse_args_into_dataclasses(argv)


def parse_json(name: str, text: str | None, kind: type) -> Any:
    """Parse the value of the option ``--name``.

    Raises:
        ValueError: If it is not JSON of the type ``kind``.
    """
    try:
        value = None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} is not JSON: {text}") from error
    if not isinstance(value, (kind, type(None))):
        raise ValueError(f"--{name} must be a JSON {kind.__name__}, but got {text}.")
    return value


def find_checkpoint(args: TrainingArguments) -> str | None:
    """Return the checkpoint to resume from, if any.

    Raises:
        ValueError: If the output folder holds another run, or there is no such checkpoint.
    """
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume in ("last", "true", "True"):
        found = find_last_checkpoint(args.output_dir) if folder.is_dir() else None
        if found is None and (folder / "model.safetensors").exists():
            raise ValueError(
                f"{folder} holds a trained model but no checkpoint to resume from. Choose another --output_dir."
            )
        return found
    if resume is not None:
        if not Path(resume).is_dir():
            raise ValueError(f"--resume_from_checkpoint takes last or the folder of a checkpoint, but got {resume!r}.")
        return resume
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} already holds a run. Resume it with --resume_from_checkpoint last, or choose another "
            "--output_dir."
        )
    return None


def build_model(model_class: type, options: NetworkArguments, class_names: list[str], **config):
    """Build a multi-exit model for the classes from the shared options; ``config`` holds further ones."""
    model = model_class.from_backbone(
        options.backbone,
        pretrained=options.pretrained,
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        backbone_kwargs=parse_json("backbone_kwargs", options.backbone_kwargs, dict),
        exits=parse_json("exits", options.exits, list),
        **config,
    )
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


class Evaluations(TrainerCallback):
    """Keeps the metrics of all evaluations in this process by their step."""

    def __init__(self):
        self.metrics: dict[int, dict[str, float]] = {}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Keep them."""
        self.metrics[state.global_step] = metrics


def train_and_save(trainer: SelfDistillationTrainer, checkpoint: str | None, metric: str) -> dict[str, float]:
    """Train from a checkpoint or the start, save model and metrics, and return the metrics of the final weights.

    Args:
        trainer: The trainer.
        checkpoint: The checkpoint to resume from.
        metric: The score of the progress table.
    """
    args, evaluations = trainer.args, Evaluations()
    transformers.logging.disable_progress_bar()  # a bar for the one file that each save writes
    huggingface_hub.utils.enable_progress_bars()  # disabled by the line above too: uploads keep theirs
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    trainer.add_callback(ProgressTable(metric))
    trainer.add_callback(evaluations)
    trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    final = state.best_global_step if args.load_best_model_at_end else state.global_step
    metrics = evaluations.metrics.get(final) or trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    return metrics
