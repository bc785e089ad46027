"""What a model card tells of a run: data, method, recipe, versions, machine. What is not known is left out."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from .._version import __version__
from ..methods import Method
from ..methods.combination import Combination

# Arguments of the optimizer, which say nothing where the user gave one.
_OPTIMIZER = ("learning_rate", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Milestones replace these.
_SCHEDULER = ("lr_scheduler_type", "lr_scheduler_kwargs")
_OTHERS = (
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "label_smoothing_factor",
    "load_best_model_at_end",
    "metric_for_best_model",
    "bf16",
    "fp16",
    "seed",
)
# Those that are told whether or not they are transformers' defaults.
_ALWAYS = ("learning_rate", "optim", "per_device_train_batch_size", "seed")


class Evaluation(NamedTuple):
    """What a trainer remembers of its last evaluation: the step, the number of images, and the metrics."""

    step: int
    num_images: int
    metrics: dict[str, float]


@dataclass(kw_only=True)
class CardFacts:
    """What is known of a model beside what the model itself tells.

    Args:
        name: What the model is called.
        repository: What loads it: a repository on the Hub, or the name of its folder.
        dataset: What people call the data, such as ``cifar10``.
        dataset_tags: Repositories of data sets on the Hub that it was trained on.
        num_train_images: Images it was trained on.
        num_eval_images: Images it was evaluated on.
        metrics: What ``evaluate`` of the trainer returned.
        method: What it was trained with.
        recipe: Settings of the training.
        base_model: Repository on the Hub that the weights came from.
        language: As in the Hub's metadata.
        license: As in the Hub's metadata.
        tags: Tags beside those that the model and the method bring.
        is_sharded: Whether the model's weights are spread over processes, so that it cannot be timed.
        has_old_policy: Whether the exit policy is from before the training, so that what was found then is void.
    """

    name: str
    repository: str
    dataset: str | None = None
    dataset_tags: Sequence[str] = ()
    num_train_images: int | None = None
    num_eval_images: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    method: Method | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    tags: Sequence[str] = ()
    is_sharded: bool = False
    has_old_policy: bool = False


def collect_facts(
    trainer: Trainer,
    folder: str,
    *,
    model_name: str | None = None,
    dataset: str | None = None,
    dataset_tags: str | Sequence[str] = (),
    finetuned_from: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] = (),
    recipe: dict[str, Any] | None = None,
) -> CardFacts:
    """Collect what a trainer knows of its run.

    Args:
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`.
        folder: Where the card goes.
        model_name: ``None`` for the name of the repository or the folder.
        dataset: As in :class:`CardFacts`.
        dataset_tags: As in :class:`CardFacts`.
        finetuned_from: Repository that the weights came from; ``None`` for what the model knows.
        language: As in the Hub's metadata.
        license: As in the Hub's metadata.
        tags: Further tags.
        recipe: What else belongs to the recipe, such as the augmentation, which the trainer does not see.
    """
    repository = trainer.hub_model_id or trainer.args.hub_model_id or Path(folder).resolve().name
    tells_training = trainer.state.global_step > 0
    evaluation = trainer.card_recorder.evaluation
    return CardFacts(
        name=model_name or repository.split("/")[-1],
        repository=repository,
        dataset=dataset,
        dataset_tags=[dataset_tags] if isinstance(dataset_tags, str) else list(dataset_tags),
        num_train_images=_length(trainer.train_dataset) if tells_training else None,
        num_eval_images=evaluation.num_images if evaluation else None,
        metrics=evaluation.metrics if evaluation else {},
        method=trainer.method if tells_training else None,
        recipe=training_recipe(trainer) | (recipe or {}) if tells_training else {},
        base_model=finetuned_from or source_of_weights(trainer.model),
        language=language,
        license=license,
        tags=[tags] if isinstance(tags, str) else list(tags),
        is_sharded=trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        has_old_policy=tells_training
        and trainer.model.config.exit_policy == trainer.card_recorder.policy_before_training,
    )


def _length(dataset: Any) -> int | None:
    return len(dataset) if dataset is not None and has_length(dataset) else None


def source_of_weights(model: nn.Module) -> str | None:
    """Return the repository on the Hub that a model started from, ``None`` if there is none."""
    name = model.config.name_or_path or ""
    if "/" not in name or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def training_recipe(trainer: Trainer) -> dict[str, Any]:
    """Return the settings that make a training: the important ones, and the others where they are no defaults."""
    args, state = trainer.args, trainer.state
    defaults = {argument.name: argument.default for argument in fields(TrainingArguments)}
    scheduler = () if trainer.lr_milestones else _SCHEDULER
    recipe = {"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}
    if state.global_step < state.max_steps:
        recipe["steps trained"] = f"{state.global_step} of {state.max_steps}"
    if args.load_best_model_at_end and state.best_global_step:
        recipe["best step"] = f"{state.best_global_step} of {state.max_steps}"
    if trainer.has_own_optimizer:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        recipe["optimizer"] = type(optimizer).__name__
    for name in _OTHERS if trainer.has_own_optimizer else (*_OPTIMIZER, *scheduler, *_OTHERS):
        value = getattr(args, name)
        if name in _ALWAYS or value != defaults[name]:
            recipe[name] = value.value if isinstance(value, Enum) else value
    if trainer.lr_milestones:
        recipe |= {"lr_milestones": list(trainer.lr_milestones), "lr_gamma": trainer.lr_gamma}
    own = {
        "decay_norms": trainer.decay_norms,
        "ema_decay": None if trainer.average is None else trainer.average.decay,
        "mix": None if trainer.mix is None else getattr(trainer.mix, "__name__", type(trainer.mix).__name__),
        "frozen backbone": trainer.model._backbone_frozen,
        "processes": args.world_size if args.world_size > 1 else None,
    }
    return recipe | {name: value for name, value in own.items() if value} | {"trained on": machine(args.device)}


def changed_hyper_parameters(method: Method) -> dict[str, Any]:
    """Return the hyper-parameters that differ from a method's defaults; of a combination under dotted names."""
    if isinstance(method, Combination):
        parts = ((part.name, changed_hyper_parameters(part)) for part in method.methods)
        return {f"{name}.{key}": value for name, part in parts for key, value in part.items()}
    changed = {}
    for parameter in fields(method):
        value = getattr(method, parameter.name)
        if parameter.default is MISSING or value is not parameter.default and value != parameter.default:
            changed[parameter.name] = name_of(value) if isinstance(value, (str, nn.Module)) else value
    return changed


def name_of(value: str | nn.Module) -> str:
    """Say where a network came from, without naming a place on this machine."""
    if isinstance(value, str):
        return Path(value).resolve().name if os.path.isdir(value) else value
    config = getattr(value, "config", None)
    if getattr(config, "name_or_path", None):
        return name_of(config.name_or_path)
    cfg = getattr(value, "pretrained_cfg", None) or {}
    tag = f".{cfg['tag']}" if cfg.get("tag") else ""
    return f"{cfg['architecture']}{tag}" if cfg.get("architecture") else type(value).__name__


def versions() -> dict[str, str]:
    """Return the versions of what the numbers of a run depend on."""
    return {
        "hf_selfkd": __version__,
        "transformers": transformers.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def commit() -> str | None:
    """Return the commit of the working directory, with ``-dirty`` behind it where files differ from it.

    ``None`` where the working directory is in no git repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


def machine(device: torch.device) -> str:
    """Return the name of a device, and of a processor how many threads torch uses."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    threads = torch.get_num_threads()
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
