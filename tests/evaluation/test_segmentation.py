import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from hf_selfkd.evaluation.segmentation import (
    compute_pixel_metrics,
    compute_segmentation_metrics,
    reduce_pixel_logits,
    reduce_to_pixel_counts,
)
from hf_selfkd.functional import cross_entropy, resize_logits


@pytest.fixture
def evaluated():
    """Return logits of two exits and label maps with ignored pixels; no pixel has label 3 or prediction 4."""
    exit_logits = [torch.randn(5, 6, 4, 6), torch.randn(5, 6, 4, 6)]
    for logits in exit_logits:
        logits[:, 4] = -100.0
    labels = torch.randint(0, 6, (5, 8, 12))
    labels[labels == 3] = -100
    labels[1] = -100
    return exit_logits, labels


def test_metrics_equal_those_of_scikit_learn(evaluated):
    exit_logits, labels = evaluated
    metrics = compute_pixel_metrics(reduce_to_pixel_counts(exit_logits, labels).numpy())
    known = labels != -100
    for name, logits in {"exit_0": exit_logits[0], "exit_1": exit_logits[1], "ensemble": sum(exit_logits) / 2}.items():
        predicted = resize_logits(logits, (8, 12)).argmax(dim=1)[known].numpy()
        labelled = labels[known].numpy()
        matrix = confusion_matrix(labelled, predicted)
        by_matrix = np.mean(np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix)))
        assert metrics[f"{name}_mean_iou"] == pytest.approx(by_matrix, abs=1e-12)
        assert metrics[f"{name}_mean_iou"] == pytest.approx(jaccard_score(labelled, predicted, average="macro"))
        assert metrics[f"{name}_pixel_accuracy"] == pytest.approx(accuracy_score(labelled, predicted))
    assert metrics["mean_iou"] == metrics["exit_1_mean_iou"]
    assert metrics["pixel_accuracy"] == metrics["exit_1_pixel_accuracy"]


def test_counts_are_the_diagonal_and_the_margins_of_the_confusion_matrix(evaluated):
    exit_logits, labels = evaluated
    counts = reduce_to_pixel_counts(exit_logits, labels)
    assert counts.shape == (5, 3, 3, 6)
    predicted = resize_logits(exit_logits[0], (8, 12)).argmax(dim=1)
    for image in range(5):
        known = labels[image] != -100
        matrix = np.zeros((6, 6), dtype=int)
        np.add.at(matrix, (labels[image][known].numpy(), predicted[image][known].numpy()), 1)
        assert counts[image, 0].tolist() == [np.diag(matrix).tolist(), matrix.sum(0).tolist(), matrix.sum(1).tolist()]


def test_counts_of_batches_add_up(evaluated):
    exit_logits, labels = evaluated
    together = reduce_to_pixel_counts(exit_logits, labels)
    parts = [
        reduce_to_pixel_counts([logits[part] for logits in exit_logits], labels[part])
        for part in (slice(2), slice(2, 5))
    ]
    assert torch.equal(torch.cat(parts), together)


def test_losses_are_means_over_the_pixels_of_an_image_then_over_images(evaluated):
    exit_logits, labels = evaluated
    metrics = compute_segmentation_metrics(*reduce_pixel_logits(exit_logits, labels))
    assert metrics["exit_0_loss"] == pytest.approx(cross_entropy(exit_logits[0], labels).item(), rel=1e-5)
    assert metrics["loss"] == metrics["exit_1_loss"] != metrics["exit_0_loss"]
    assert {"mean_iou", "ensemble_pixel_accuracy"} <= metrics.keys()


def test_metrics_are_zero_where_no_pixel_is_labelled():
    reduced = reduce_pixel_logits([torch.randn(2, 3, 4, 4)], torch.full((2, 4, 4), -100))
    assert set(compute_segmentation_metrics(*reduced).values()) == {0.0}
