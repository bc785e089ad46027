"""Accuracy and calibration of every exit as a metric of the `evaluate` library."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from ..models.labels import class_labels
from .classification import compute_class_metrics, reduce_class_logits

_DESCRIPTION = "Cross-entropy, accuracy and expected calibration error of every exit and of their ensemble."

_INPUTS = """
Args:
    predictions: Logits of all exits, first to last, (images, exits, classes).
    references: Class indices, (images,); -100 where there is no label.

Returns:
    loss, accuracy and calibration_error of the final exit, the same of every exit (exit_0_accuracy, ...), and
    ensemble_accuracy and ensemble_calibration_error of the mean of all logits.
"""


class MultiExitAccuracy(evaluate.Metric):
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
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
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

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs) -> None:
        """Add logits ``(exits, classes)`` and the label of one image."""
        # evaluate.combine uses the argument names of add_batch.
        prediction, reference = kwargs.get("predictions", prediction), kwargs.get("references", reference)
        self.add_batch(predictions=torch.as_tensor(prediction)[None], references=torch.as_tensor(reference)[None])

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return compute_class_metrics(predictions, np.asarray(references) != -100)
