"""The tasks, one record each: checks and preparation of labels, metrics, and words of the model card.

A new task needs a model class with its name as ``task``, and a record here. Training, evaluation and model card take
everything that differs by task from the record.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .evaluation.classification import compute_class_metrics, reduce_class_logits
from .evaluation.multi_label import compute_binary_metrics, reduce_binary_logits
from .evaluation.segmentation import compute_segmentation_metrics, reduce_pixel_logits
from .models.multi_label import MULTI_LABEL, is_known


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, as training, evaluation and model card need it.

    Args:
        name: ``task`` of its models.
        pipeline_tag: That of its models on the Hub.
        auto_class: The class of transformers that loads its models.
        check_label: ``(label, sample, config, name)`` raises ValueError, whose text begins with ``name``, unless the
            label of a sample, a dictionary with ``pixel_values``, suits a model with this configuration.
        prepare_labels: ``(labels, config) -> labels``: a batch of labels, with -100 wherever there is none, of a
            multi-label model NaN.
        reduce_logits: ``(exit_logits, labels)`` reduces the logits of all exits and the prepared labels of a batch to
            small tensors, images first, which are all that evaluation keeps.
        compute_metrics: Takes these tensors, of all images and one argument each, and returns metrics by name: those
            in ``metric_titles``, alone for the final exit, after ``exit_<i>_`` for every exit and after
            ``ensemble_``; and ``loss``, alone and for every exit.
        metric_titles: Title of each metric in the results table, in percent; the first is the headline metric.
        takes_soft_labels: Whether labels may be probabilities, as mixup makes them.
        takes_label_smoothing: Whether ``label_smoothing_factor`` may be set, which spreads a label over all classes.
        exits_early: Whether its models can exit early, so that every exit has a cost of its own.
        kind: A noun phrase for its models, to begin a sentence.
        final_exit: A noun phrase for the final exit, to end a sentence.
        example: Python code that uses a model from the Hub, with ``{repository}`` for its name and ``{num_labels}``
            for its number of classes.
    """

    name: str
    pipeline_tag: str
    auto_class: str
    check_label: Callable[[Any, Mapping[str, Any], PreTrainedConfig, str], None]
    prepare_labels: Callable[[Tensor, PreTrainedConfig], Tensor]
    reduce_logits: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, ...]]
    compute_metrics: Callable[..., dict[str, float]]
    metric_titles: Mapping[str, str]
    takes_soft_labels: bool
    takes_label_smoothing: bool
    exits_early: bool
    kind: str
    final_exit: str
    example: str

    @property
    def metric(self) -> str:
        """The headline metric, such as ``accuracy``."""
        return next(iter(self.metric_titles))


def check_class(label: Any, sample: Mapping[str, Any], config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError unless a label is a class index, -100, or a list of class probabilities."""
    if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, (int, np.integer)):
        if label != -100 and not 0 <= label < config.num_labels:
            raise ValueError(
                f"{name} has label {label}, but the model has {config.num_labels} classes (0 to "
                f"{config.num_labels - 1}). Build the model with num_labels of the data."
            )
    elif not _are_probabilities(label, config.num_labels):
        raise ValueError(
            f"{name} has the label {reprlib.repr(label)}, but a label is a class index or {config.num_labels} "
            "probabilities. Use -100 where there is none."
        )


def _are_probabilities(label: Any, num_labels: int) -> bool:
    if not isinstance(label, (list, tuple, Tensor, np.ndarray)) or len(label) != num_labels:
        return False
    return all(isinstance(value, float) for value in (label if isinstance(label, (list, tuple)) else label.tolist()))


def check_label_set(label: Any, sample: Mapping[str, Any], config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError unless a label is a vector of 0, 1, -100 or probabilities, one for every class."""
    try:
        values = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.shape != (config.num_labels,):
        raise ValueError(
            f"{name} has the label {reprlib.repr(label)}, but problem_type is multi_label_classification, where a "
            f"label is a vector of {config.num_labels} values, one for every class: 1 where the image has it, 0 where "
            "not and -100 where unknown."
        )
    wrong = values[is_known(values) & ~((values >= 0) & (values <= 1))]
    if len(wrong):
        raise ValueError(
            f"{name} has {wrong[0].item()} in its label, but in a multi-label one a class has 1 or 0, a probability "
            "between, or -100 where unknown."
        )


def check_label_map(label: Any, sample: Mapping[str, Any], config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError unless a label is a map of class indices or ignored pixels of the size of its image."""
    if getattr(label, "ndim", 0) != 2:
        raise ValueError(
            f"{name} has the label {reprlib.repr(label)}, but a label is a map of class indices, an array of (height, "
            f"width). Mark pixels without a class with {config.semantic_loss_ignore_index}."
        )
    label = torch.as_tensor(label)
    image_size = sample["pixel_values"].shape[-2:]
    if label.shape != image_size:
        raise ValueError(
            f"{name} has a label map of {tuple(label.shape)} pixels, but an image of {tuple(image_size)}. Transform "
            "both together."
        )
    ignored = config.semantic_loss_ignore_index
    wrong = set(label.unique().tolist()) - set(range(config.num_labels)) - {-100, ignored}
    if wrong:
        raise ValueError(
            f"{name} has a pixel of class {min(wrong)}, but the model has {config.num_labels} classes (0 to "
            f"{config.num_labels - 1}) and ignores {ignored}. Build the model with num_labels and "
            "semantic_loss_ignore_index of the data."
        )


def _keep(labels: Tensor, config: PreTrainedConfig) -> Tensor:
    return labels


def _as_probabilities(labels: Tensor, config: PreTrainedConfig) -> Tensor:
    # Unknown labels become NaN, so that mixing them with known ones gives unknown ones.
    labels = labels.float()
    return labels.masked_fill(~is_known(labels), torch.nan)


def _mask_ignored(labels: Tensor, config: PreTrainedConfig) -> Tensor:
    return labels.long().masked_fill(labels == config.semantic_loss_ignore_index, -100)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="image-classification",
            pipeline_tag="image-classification",
            auto_class="AutoModelForImageClassification",
            check_label=check_class,
            prepare_labels=_keep,
            reduce_logits=reduce_class_logits,
            compute_metrics=compute_class_metrics,
            metric_titles={"accuracy": "accuracy (%)", "calibration_error": "calibration error (%)"},
            takes_soft_labels=True,
            takes_label_smoothing=True,
            exits_early=True,
            kind="An image classifier",
            final_exit="the classification head of the backbone",
            example="""from transformers import pipeline

classifier = pipeline("image-classification", model="{repository}", trust_remote_code=True)
for prediction in classifier("photo.png"):
    print(prediction["label"], prediction["score"])""",
        ),
        Task(
            name=MULTI_LABEL,
            pipeline_tag="image-classification",
            auto_class="AutoModelForImageClassification",
            check_label=check_label_set,
            prepare_labels=_as_probabilities,
            reduce_logits=reduce_binary_logits,
            compute_metrics=compute_binary_metrics,
            metric_titles={
                "mean_average_precision": "mean average precision (%)",
                "f1": "F1 (%)",
                "accuracy": "exact-match accuracy (%)",
            },
            takes_soft_labels=True,
            takes_label_smoothing=False,
            exits_early=True,
            kind="A multi-label image classifier",
            final_exit="the classification head of the backbone",
            example="""from transformers import pipeline

classifier = pipeline("image-classification", model="{repository}", trust_remote_code=True)
for prediction in classifier("photo.png", top_k={num_labels}):
    if prediction["score"] > 0.5:  # of each class, the sigmoid of its logit
        print(prediction["label"], prediction["score"])""",
        ),
        Task(
            name="image-segmentation",
            pipeline_tag="image-segmentation",
            auto_class="AutoModelForSemanticSegmentation",
            check_label=check_label_map,
            prepare_labels=_mask_ignored,
            reduce_logits=reduce_pixel_logits,
            compute_metrics=compute_segmentation_metrics,
            metric_titles={"mean_iou": "mean IoU (%)", "pixel_accuracy": "pixel accuracy (%)"},
            takes_soft_labels=False,
            takes_label_smoothing=False,
            exits_early=False,
            kind="A semantic segmentation model",
            final_exit="the segmentation head of the feature pyramid",
            example="""from transformers import pipeline

segmenter = pipeline("image-segmentation", model="{repository}", trust_remote_code=True)
for prediction in segmenter("photo.png"):
    print(prediction["label"], prediction["mask"].size)""",
        ),
    )
}


def task_of(model: nn.Module) -> Task:
    """Return the task of a multi-exit model."""
    return TASKS[model.task]
