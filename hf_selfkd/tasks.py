"""The tasks, one record each: checks and conversion of labels, metrics, and words of the model card.

A new task needs a model class with its name as ``task``, and a record here. Training, evaluation and model card take
everything that differs by task from the record.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from .evaluation.classification import compute_class_metrics, reduce_class_logits
from .evaluation.multi_label import compute_binary_metrics, reduce_binary_logits
from .evaluation.per_class import IMAGES, PIXELS, ClassCounts
from .evaluation.segmentation import compute_segmentation_metrics, reduce_pixel_logits
from .models.labels import class_labels, label_maps, label_sets
from .models.multi_label import MULTI_LABEL


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, as training, evaluation and model card need it.

    Args:
        name: ``task`` of its models.
        pipeline_tag: That of its models on the Hub.
        auto_class: The class of transformers that loads its models.
        convert_labels: ``(labels, config, name, image_size=None, check_values=True)`` returns a batch of labels as
            tensors of int64 or, for probabilities, float32, with -100 wherever there is none (in a multi-label model
            NaN). Raises ValueError, whose
            text begins with ``name``, unless they suit a model with this configuration, and images of that size if it
            is given; ``check_values=False`` looks at type and shape only, without waiting for an accelerator.
        reduce_logits: ``(exit_logits, labels)`` reduces the logits of all exits and the prepared labels of a batch to
            small tensors, images first, which are all that evaluation keeps.
        compute_metrics: Takes these tensors, of all images and one argument each, and returns metrics by name: those
            in ``metric_titles``, alone for the final exit, after ``exit_<i>_`` for every exit and after
            ``ensemble_``; and ``loss``, alone and for every exit.
        class_counts: How results per class are counted; ``None`` where an image has no single class.
        metric_titles: Title of each metric in the results table, in percent; the first is the headline metric.
        takes_soft_labels: Whether labels may be probabilities, as mixup makes them.
        takes_label_smoothing: Whether ``label_smoothing_factor`` may be set, which spreads a label over all classes.
        has_ignored_pixels: Whether labels are maps, in which pixels may be ignored.
        exits_early: Whether its models can exit early, so that every exit has a cost of its own.
        kind: A noun phrase for its models, to begin a sentence.
        final_exit: A noun phrase for the final exit, to end a sentence.
        example: Python code that uses a model from the Hub, with ``{repository}`` for its name and ``{num_labels}``
            for its number of classes.
    """

    name: str
    pipeline_tag: str
    auto_class: str
    convert_labels: Callable[..., Tensor]
    reduce_logits: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, ...]]
    compute_metrics: Callable[..., dict[str, float]]
    metric_titles: Mapping[str, str]
    takes_soft_labels: bool
    takes_label_smoothing: bool
    exits_early: bool
    kind: str
    final_exit: str
    example: str
    has_ignored_pixels: bool = False
    class_counts: ClassCounts | None = None

    @property
    def metric(self) -> str:
        """The headline metric, such as ``accuracy``."""
        return next(iter(self.metric_titles))


def _convert_classes(labels: Any, config: PreTrainedConfig, name: str, image_size=None, check_values=True) -> Tensor:
    return class_labels(labels, config.num_labels, name, check_values=check_values)


def _convert_sets(labels: Any, config: PreTrainedConfig, name: str, image_size=None, check_values=True) -> Tensor:
    return label_sets(labels, config.num_labels, name, check_values=check_values)


def _convert_maps(labels: Any, config: PreTrainedConfig, name: str, image_size=None, check_values=True) -> Tensor:
    ignore_index = config.semantic_loss_ignore_index
    return label_maps(labels, image_size, config.num_labels, ignore_index, name, check_values=check_values)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="image-classification",
            pipeline_tag="image-classification",
            auto_class="AutoModelForImageClassification",
            convert_labels=_convert_classes,
            reduce_logits=reduce_class_logits,
            compute_metrics=compute_class_metrics,
            class_counts=IMAGES,
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
            convert_labels=_convert_sets,
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
            convert_labels=_convert_maps,
            reduce_logits=reduce_pixel_logits,
            compute_metrics=compute_segmentation_metrics,
            class_counts=PIXELS,
            metric_titles={"mean_iou": "mean IoU (%)", "pixel_accuracy": "pixel accuracy (%)"},
            takes_soft_labels=False,
            takes_label_smoothing=False,
            has_ignored_pixels=True,
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

# Python code for a checkpoint that holds an adapter alone.
ADAPTER_EXAMPLE = """from hf_selfkd import {model_class}
from peft import PeftModel

base = {model_class}.from_pretrained("...")  # the model that the adapter was trained on
model = PeftModel.from_pretrained(base, "{repository}")"""

# The example of the card for networks whose images no image processor makes.
TENSOR_EXAMPLE = """import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repository}", trust_remote_code=True).eval()
# Pipelines read images of one or three channels only. Normalise by mean and std in model.config.pretrained_cfg.
pixel_values = torch.randn(1, {channels}, {height}, {width})
with torch.no_grad():
    print(model(pixel_values).logits.argmax(dim=1))"""


def task_of(model: nn.Module) -> Task:
    """Return the task of a multi-exit model."""
    return TASKS[model.task]
