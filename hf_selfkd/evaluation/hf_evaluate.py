"""The metrics of every exit as metrics of the `evaluate` library: of single labels, and of multi-label models."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from ..models.labels import class_labels
from .classification import compute_class_metrics, reduce_class_logits
from .multi_label import compute_binary_metrics, reduce_binary_logits

_INPUTS = """
Args:
    predictions: Logits of all exits, first to last, (images, exits, classes).
    references: {references}

Returns:
    {metrics} of the final exit, the same of every exit (exit_0_accuracy, ...) and, loss aside, of the mean of all
    logits (ensemble_accuracy, ...).
"""


class _ExitMetric(evaluate.Metric):
    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs) -> None:
        """Add logits ``(exits, classes)`` and the label of one image."""
        # evaluate.combine uses the argument names of add_batch.
        prediction, reference = kwargs.get("predictions", prediction), kwargs.get("references", reference)
        self.add_batch(predictions=torch.as_tensor(prediction)[None], references=torch.as_tensor(reference)[None])


class MultiExitAccuracy(_ExitMetric):
    """Cross-entropy, accuracy and expected calibration error of every exit and of their ensemble.

    The values equal those that the trainer reports. Use the class itself, alone or in ``evaluate.combine``;
    ``evaluate.load`` would look for a metric of this name on the Hub. Logits ``(images, exits, classes)`` are reduced
    when they are added, so that neither memory nor the cache file grows with the number of classes.

    Example:
        >>> metric = MultiExitAccuracy(keep_in_memory=True)
        >>> found = metric.compute(predictions=[[[2.0, 0.0], [3.0, 0.0]], [[1.0, 0.0], [0.0, 4.0]]], references=[0, 1])
        >>> found["exit_0_accuracy"], found["accuracy"], found["ensemble_accuracy"]
        (0.5, 1.0, 1.0)
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Cross-entropy, accuracy and expected calibration error of every exit and of their ensemble.",
            citation="",
            inputs_description=_INPUTS.format(
                references="Class indices, (images,); -100 where there is no label.",
                metrics="loss, accuracy and calibration_error",
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.List(datasets.Value("float32"))),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs) -> None:
        """Add logits ``(images, exits, classes)`` and labels ``(images,)``.

        Raises:
            ValueError: If logits or labels have other shapes.
        """
        logits, labels = torch.as_tensor(predictions), torch.as_tensor(references)
        if logits.ndim != 3 or labels.shape != logits.shape[:1]:
            raise ValueError(
                "MultiExitAccuracy needs logits shaped (images, exits, classes) and as many class indices, but got "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}. Stack the exits' logits along dimension 1."
            )
        labels = class_labels(labels, logits.shape[2], "A batch")
        predictions, _ = reduce_class_logits(logits.unbind(dim=1), labels)
        super().add_batch(predictions=predictions.cpu().numpy(), references=labels.cpu().numpy(), **kwargs)

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return compute_class_metrics(predictions, np.asarray(references) != -100)


class MultiExitAveragePrecision(_ExitMetric):
    """Binary cross-entropy, mean average precision, F1 and exact matches of every exit of a multi-label model.

    The values equal those that the trainer reports; see
    :func:`~hf_selfkd.evaluation.multi_label.compute_binary_metrics`. All logits are kept, because average precision
    ranks all images.

    Example:
        >>> metric = MultiExitAveragePrecision(keep_in_memory=True)
        >>> logits = [[[2.0, -1.0], [3.0, 1.0]], [[1.0, -2.0], [-1.0, 2.0]]]
        >>> found = metric.compute(predictions=logits, references=[[1, 1], [0, 1]])
        >>> found["exit_0_mean_average_precision"], found["f1"], found["ensemble_accuracy"]
        (1.0, 1.0, 0.0)
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Binary cross-entropy, mean average precision, F1 and exact matches of every exit.",
            citation="",
            inputs_description=_INPUTS.format(
                references="0 or 1 for every class, (images, classes); -100 where unknown.",
                metrics="loss, mean_average_precision, f1 and accuracy",
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.List(datasets.Value("float32"))),
                    "references": datasets.List(datasets.Value("float32")),
                }
            ),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs) -> None:
        """Add logits ``(images, exits, classes)`` and labels ``(images, classes)``.

        Raises:
            ValueError: If logits or labels have other shapes.
        """
        logits, labels = torch.as_tensor(predictions), torch.as_tensor(references)
        if logits.ndim != 3 or labels.shape != (len(logits), logits.shape[2]):
            raise ValueError(
                "MultiExitAveragePrecision needs logits shaped (images, exits, classes) and labels shaped (images, "
                f"classes), but got {tuple(logits.shape)} and {tuple(labels.shape)}. Stack the exits' logits along "
                "dimension 1."
            )
        logits, labels = reduce_binary_logits(logits.unbind(dim=1), labels)
        super().add_batch(predictions=logits.cpu().numpy(), references=labels.cpu().numpy(), **kwargs)

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return compute_binary_metrics(np.asarray(predictions), np.asarray(references))
