"""The parts that the training examples share: options, the model, and the run from checkpoint to saved model."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

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
        default_factory=lambda: [75, 130, 180], metadata={"help": "Epochs after which the learning rate drops."}
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


class LastEvaluation(TrainerCallback):
    """Keeps the metrics of the last evaluation in this process and its step."""

    step, metrics = -1, None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Keep them."""
        self.step, self.metrics = state.global_step, metrics


def train_and_save(trainer: SelfDistillationTrainer, checkpoint: str | None, metric: str) -> dict[str, float]:
    """Train from a checkpoint or the start, save model and metrics, and return the metrics of the final weights.

    Args:
        trainer: The trainer.
        checkpoint: The checkpoint to resume from.
        metric: The score of the progress table.
    """
    args, last = trainer.args, LastEvaluation()
    transformers.logging.disable_progress_bar()  # a bar for the one file that each save writes
    huggingface_hub.utils.enable_progress_bars()  # disabled by the line above too: uploads keep theirs
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    trainer.add_callback(ProgressTable(metric))
    trainer.add_callback(last)
    trainer.train(resume_from_checkpoint=checkpoint)
    is_known = last.step == trainer.state.global_step and not args.load_best_model_at_end
    metrics = last.metrics if is_known else trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    return metrics
