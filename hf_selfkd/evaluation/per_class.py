"""Results per class: confusion matrices of every exit and of the ensemble, as tables, files and pictures."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.loss import resize_logits

# Classes up to which the picture of a confusion matrix names them.
MAX_NAMED_CLASSES = 40


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """How confusion matrices of a task are counted, and the score of a class.

    Args:
        reduce: ``(exit_logits, labels) -> counts``: of every image what is to be gathered from all processes.
        add_up: ``(counts, num_labels) -> matrices``: confusion matrices ``(exits + 1, classes, classes)`` in int64, of
            every exit and the ensemble; rows are labels, columns predictions.
        score: ``matrices -> scores``, ``(exits + 1, classes)``, NaN where a class does not occur.
        title: Name of the score.
        unit: What is counted, in the plural.
    """

    reduce: Callable[[Sequence[Tensor], Tensor], Tensor]
    add_up: Callable[[Tensor, int], np.ndarray]
    score: Callable[[np.ndarray], np.ndarray]
    title: str
    unit: str


def reduce_to_classes(exit_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the class of every label, and the predictions of every exit and the ensemble.

    Args:
        exit_logits: ``(batch, classes)`` of every exit.
        labels: Class indices ``(batch,)``, -100 where there is no label, or probabilities ``(batch, classes)``.

    Returns:
        ``(batch, exits + 2)``, -100 in the first column where there is no label.
    """
    exit_logits = [torch.as_tensor(logits).float() for logits in exit_logits]
    labels = torch.as_tensor(labels, device=exit_logits[0].device)
    if labels.ndim == 2:
        labels = labels.argmax(dim=1).masked_fill(labels.sum(dim=1) == 0, -100)
    predictions = [logits.argmax(dim=1) for logits in [*exit_logits, torch.stack(exit_logits).mean(dim=0)]]
    return torch.stack([labels.long(), *predictions], dim=1)


def add_up_classes(classes: Tensor, num_labels: int) -> np.ndarray:
    """Count confusion matrices ``(exits + 1, classes, classes)`` of the result of :func:`reduce_to_classes`.

    Example:
        >>> add_up_classes(torch.tensor([[0, 0, 1], [1, 1, 1], [-100, 0, 0]]), 2).tolist()
        [[[1, 0], [0, 1]], [[0, 1], [0, 1]]]
    """
    classes = classes[classes[:, 0] != -100].cpu()
    cells = classes[:, :1] * num_labels + classes[:, 1:]
    counts = [torch.bincount(column, minlength=num_labels**2) for column in cells.unbind(dim=1)]
    return torch.stack(counts).reshape(-1, num_labels, num_labels).numpy()


def reduce_to_pixel_confusion(exit_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Count the confusion matrices of every exit and the ensemble over the labelled pixels of each image.

    Args:
        exit_logits: ``(batch, classes, height, width)`` of every exit, interpolated to the size of the labels.
        labels: Class indices ``(batch, height, width)``, -100 where there is no label.

    Returns:
        ``(batch, exits + 1, classes, classes)`` in int32; rows are labels, columns predictions.
    """
    exit_logits = [torch.as_tensor(logits).float() for logits in exit_logits]
    labels = torch.as_tensor(labels, device=exit_logits[0].device).long()
    classes = exit_logits[0].shape[1]
    matrices = []
    for logits in [*exit_logits, torch.stack(exit_logits).mean(dim=0)]:
        predictions = resize_logits(logits, labels.shape[-2:]).argmax(dim=1)
        # An additional cell takes the ignored pixels.
        cells = torch.where(labels == -100, classes**2, labels * classes + predictions).flatten(1)
        counts = torch.zeros(len(cells), classes**2 + 1, dtype=torch.int32, device=cells.device)
        counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=torch.int32))
        matrices.append(counts[:, :-1].unflatten(1, (classes, classes)))
    return torch.stack(matrices, dim=1)


def add_up_pixels(matrices: Tensor, num_labels: int) -> np.ndarray:
    """Add up the matrices of all images, from :func:`reduce_to_pixel_confusion`."""
    return matrices.sum(dim=0, dtype=torch.int64).cpu().numpy()


def class_accuracy(matrices: np.ndarray) -> np.ndarray:
    """Return the share of each class that is predicted as it, ``(exits + 1, classes)``, NaN for absent classes."""
    return _share(_diagonal(matrices), matrices.sum(axis=-1))


def class_iou(matrices: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class, ``(exits + 1, classes)``, NaN for absent classes."""
    correct = _diagonal(matrices)
    return _share(correct, matrices.sum(axis=-1) + matrices.sum(axis=-2) - correct)


def _diagonal(matrices: np.ndarray) -> np.ndarray:
    return np.diagonal(matrices, axis1=-2, axis2=-1)


def _share(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.where(total > 0, part / np.maximum(total, 1), np.nan)


IMAGES = ClassCounts(
    reduce=reduce_to_classes, add_up=add_up_classes, score=class_accuracy, title="accuracy", unit="images"
)
PIXELS = ClassCounts(
    reduce=reduce_to_pixel_confusion, add_up=add_up_pixels, score=class_iou, title="IoU", unit="pixels"
)


class ConfusionMatrices:
    """Confusion matrices of an evaluation, added up batch by batch, so that memory does not grow with its images.

    Args:
        counts: How the task counts.
        num_labels: Number of classes.

    Attributes:
        total: ``(exits + 1, classes, classes)``, of every exit and the ensemble; ``None`` before the first batch.
    """

    def __init__(self, counts: ClassCounts, num_labels: int):
        self.counts = counts
        self.num_labels = num_labels
        self.total: np.ndarray | None = None

    def add(self, exit_logits: Sequence[Tensor], labels: Tensor, gather: Callable[[Tensor], Tensor]) -> None:
        """Add a batch.

        Args:
            exit_logits: Logits of every exit.
            labels: Prepared labels of the batch.
            gather: Gathers a tensor, images first, from all processes, without images that were added as padding.
        """
        matrices = self.counts.add_up(gather(self.counts.reduce(exit_logits, labels)), self.num_labels)
        self.total = matrices if self.total is None else self.total + matrices


def class_rows(counts: ClassCounts, matrices: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a table row per class: its name, its labels, and its score at every exit and of the ensemble.

    Args:
        counts: Of the task: :data:`IMAGES` or :data:`PIXELS`.
        matrices: Confusion matrices ``(exits + 1, classes, classes)``.
        names: Names of the classes.
    """
    exits = [*(f"exit {exit}" for exit in range(len(matrices) - 1)), "ensemble"]
    labelled, scores = matrices[0].sum(axis=1), counts.score(matrices)
    return [
        {"class": name, counts.unit: int(labelled[index])}
        | {
            f"{counts.title} ({exit})": "" if np.isnan(score) else round(float(score), 4)
            for exit, score in zip(exits, scores[:, index], strict=True)
        }
        for index, name in enumerate(names)
    ]


def write_class_scores(counts: ClassCounts, matrices: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Write the rows of :func:`class_rows` as CSV."""
    rows = class_rows(counts, matrices, names)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_confusion(matrix: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Write a confusion matrix ``(classes, classes)`` as CSV; rows are labels, columns predictions."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label \\ prediction", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))


def plot_confusion(matrix: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Draw a confusion matrix ``(classes, classes)``, each row as shares of its labels.

    Args:
        matrix: Counts; rows are labels, columns predictions.
        names: Names of the classes, which are left out where there are many.
        path: File to write; its ending decides the format.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A plot needs matplotlib. Run pip install hf_selfkd[plots].") from error

    side = min(12.0, 3 + 0.25 * len(matrix))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(_share(matrix, matrix.sum(axis=1, keepdims=True)), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(picture, label="share of the labels of a class")
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if len(matrix) <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(matrix)), names, rotation=90)
        axes.set_yticks(range(len(matrix)), names)
    figure.savefig(path)
