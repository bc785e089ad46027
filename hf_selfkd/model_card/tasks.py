"""The part of a task that model cards need."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, as its model card describes it.

    Args:
        name: ``task`` of its models, and the pipeline tag on the Hub.
        auto_class: The class of transformers that loads its models.
        metric_titles: Title of each metric in the results table, in percent; the first is the headline metric.
        exits_early: Whether its models can exit early, so that every exit has a cost of its own.
        kind: What a model is, to begin a sentence.
        final_exit: What the final exit is, to end one.
        example: Python code that uses a model from the Hub, with ``{repository}`` for its name.
    """

    name: str
    auto_class: str
    metric_titles: Mapping[str, str]
    exits_early: bool
    kind: str
    final_exit: str
    example: str

    @property
    def metric(self) -> str:
        """The headline metric, such as ``accuracy``."""
        return next(iter(self.metric_titles))


TASKS = {
    task.name: task
    for task in (
        Task(
            name="image-classification",
            auto_class="AutoModelForImageClassification",
            metric_titles={"accuracy": "accuracy (%)", "calibration_error": "calibration error (%)"},
            exits_early=True,
            kind="An image classifier",
            final_exit="the classification head of the backbone",
            example="""from transformers import pipeline

classifier = pipeline("image-classification", model="{repository}", trust_remote_code=True)
for prediction in classifier("photo.png"):
    print(prediction["label"], prediction["score"])""",
        ),
        Task(
            name="image-segmentation",
            auto_class="AutoModelForSemanticSegmentation",
            metric_titles={"mean_iou": "mean IoU (%)", "pixel_accuracy": "pixel accuracy (%)"},
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
