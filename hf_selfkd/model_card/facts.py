"""Facts of a run for its model card: data, method, recipe, measurements. Unknown facts are left out."""

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import has_length

from ..evaluation.costs import exit_latencies
from ..methods import Method
from ..methods.combination import Combination
from ..tasks import task_of
from .environment import current_commit, device_name, versions
from .evaluations import evaluation_facts
from .per_class import write_class_results
from .recipe import training_recipe

# Runs that the latencies of a card are the median of.
LATENCY_RUNS = 10


@dataclass(kw_only=True)
class CardFacts:
    """Facts for a model card that the model itself does not hold. All values can be written as JSON.

    Args:
        name: Title of the card.
        repository: Where users load the model from: a repository on the Hub, or the name of its folder.
        dataset: Display name of the dataset, such as ``cifar10``.
        dataset_tags: Datasets on the Hub that the model was trained on.
        num_train_images: Number of training images.
        num_eval_images: Number of evaluation images.
        metrics: Return value of the trainer's ``evaluate``; values that are not finite are dropped.
        results: Results on further datasets, each with its ``name``, ``num_images`` and ``metrics``, whose names begin
            with ``eval_`` as in ``metrics``.
        class_results: Files with the results per class, see
            :func:`~hf_selfkd.model_card.per_class.write_class_results`.
        methods: Methods that the model was trained with, each with ``name``, ``summary`` and ``paper``, see
            :func:`method_facts`.
        hyper_parameters: Hyper-parameters of the methods that differ from their defaults.
        recipe: Training settings; empty for a model that was not trained.
        base_model: Repository on the Hub that the weights came from.
        language: As in the Hub's metadata.
        license: As in the Hub's metadata.
        tags: Tags in addition to those of the model and the methods.
        latency: ``milliseconds`` to each exit at batch size 1, with ``runs``, ``dtype`` and ``device``; ``None`` if it
            was not measured, see :func:`measure_latency`.
        versions: Versions of the software that the model was trained with.
        commit: Git commit that the model was trained at, with the suffix ``-dirty`` for uncommitted changes.
        has_old_policy: Whether the exit policy was calibrated for earlier weights.
        trial: Accuracy and cost of the exit policy on held-out images, see
            :func:`~hf_selfkd.model_card.update_model_card`.
    """

    name: str
    repository: str
    dataset: str | None = None
    dataset_tags: Sequence[str] = ()
    num_train_images: int | None = None
    num_eval_images: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    results: Sequence[dict[str, Any]] = ()
    class_results: Sequence[dict[str, str | None]] = ()
    methods: Sequence[dict[str, str]] = ()
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    tags: Sequence[str] = ()
    latency: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=versions)
    commit: str | None = None
    has_old_policy: bool = False
    trial: dict[str, Any] | None = None

    def __post_init__(self):
        self.metrics = _known(self.metrics)
        self.results = [result | {"metrics": _known(result["metrics"])} for result in self.results]


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
    latency: bool = False,
    commit: bool = False,
    per_class: bool = False,
) -> CardFacts:
    """Collect the facts of a trainer's run.

    Args:
        trainer: A :class:`~hf_selfkd.SelfDistillationTrainer`.
        folder: Folder of the card.
        model_name: Title of the card; ``None`` for the name of the repository or the folder.
        dataset: As in :class:`CardFacts`.
        dataset_tags: As in :class:`CardFacts`.
        finetuned_from: Repository that the weights came from; ``None`` for the one named in its configuration.
        language: As in the Hub's metadata.
        license: As in the Hub's metadata.
        tags: Additional tags.
        recipe: Settings that the trainer does not know, such as the augmentation.
        latency: Measure the milliseconds to each exit, by a few forward passes with one image; not possible for
            segmentation and for weights that are sharded over processes.
        commit: Record the git commit of the working directory.
        per_class: Write the scores of every class and the confusion matrix into the folder; evaluations count them
            only where ``card={"per_class": True}`` was given to the trainer.
    """
    evaluations = trainer.card_recorder.evaluations
    repository = trainer.hub_model_id or trainer.args.hub_model_id or Path(folder).resolve().name
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return CardFacts(
        name=model_name or repository.split("/")[-1],
        repository=repository,
        dataset=dataset,
        dataset_tags=_listed(dataset_tags),
        base_model=finetuned_from or source_of_weights(trainer.model),
        language=language,
        license=license,
        tags=[*trainer.model.model_tags, *_listed(tags)],
        latency=measure_latency(trainer.model) if latency and not is_sharded else None,
        commit=current_commit() if commit else None,
        class_results=write_class_results(trainer.network, evaluations, folder) if per_class else (),
        **evaluation_facts(evaluations),
        **_training_facts(trainer, recipe or {}),
    )


def _training_facts(trainer: Trainer, recipe: dict[str, Any]) -> dict[str, Any]:
    if trainer.state.global_step == 0:
        return {}
    return {
        "num_train_images": _length(trainer.train_dataset),
        "recipe": training_recipe(trainer) | recipe,
        "has_old_policy": trainer.model.config.exit_policy == trainer.card_recorder.policy_before_training,
        **method_facts(trainer.method),
    }


def is_known(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _known(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if is_known(value)}


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _length(dataset: Any) -> int | None:
    return len(dataset) if dataset is not None and has_length(dataset) else None


def source_of_weights(model: nn.Module) -> str | None:
    """Return the repository on the Hub that a model's weights came from, ``None`` if there is none."""
    name = model.config.name_or_path or ""
    if "/" not in name or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def changed_hyper_parameters(method: Method) -> dict[str, Any]:
    """Return a method's hyper-parameters that differ from their defaults, for a combination under dotted names."""
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
    """Return the name of a network, which for a local folder is the folder's name without its path."""
    if isinstance(value, str):
        return Path(value).resolve().name if os.path.isdir(value) else value
    config = getattr(value, "config", None)
    if getattr(config, "name_or_path", None):
        return name_of(config.name_or_path)
    cfg = getattr(value, "pretrained_cfg", None) or {}
    tag = f".{cfg['tag']}" if cfg.get("tag") else ""
    return f"{cfg['architecture']}{tag}" if cfg.get("architecture") else type(value).__name__


def method_facts(method: Method) -> dict[str, Any]:
    """Return ``methods`` and ``hyper_parameters`` for :class:`CardFacts`."""
    methods = method.methods if isinstance(method, Combination) else [method]
    return {
        "methods": [{"name": part.name, "summary": _summary(part), "paper": part.paper} for part in methods],
        "hyper_parameters": changed_hyper_parameters(method),
    }


def _summary(method: Method) -> str:
    """Return the first line of a method's docstring; empty without one, as dataclasses then show their signature."""
    summary = (inspect.getdoc(type(method)) or "").partition("\n")[0]
    return "" if summary.startswith(f"{type(method).__name__}(") else summary


def measure_latency(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return the latency to each exit for :class:`CardFacts`, ``None`` for a model that is not a classifier.

    Runs one image of random pixels through the model, on the device that the model is on.
    """
    if not task_of(model).exits_early:
        return None
    was_training = model.training
    model.eval()
    try:
        milliseconds = exit_latencies(model, repeats=LATENCY_RUNS)
    finally:
        model.train(was_training)
    dtype, device = str(model.dtype).removeprefix("torch."), device_name(model.device)
    return {"milliseconds": milliseconds, "runs": LATENCY_RUNS, "dtype": dtype, "device": device}
