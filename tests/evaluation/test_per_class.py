"""Results per class: counts against scikit-learn, scores, files and pictures."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from hf_selfkd.evaluation.classification import compute_class_metrics, reduce_class_logits
from hf_selfkd.evaluation.per_class import (
    IMAGES,
    PIXELS,
    ConfusionMatrices,
    class_rows,
    plot_confusion,
    write_class_scores,
    write_confusion,
)
from hf_selfkd.evaluation.segmentation import compute_pixel_metrics, reduce_to_pixel_counts


def matrices_of(counts, exit_logits, labels, num_labels, batch_size=7):
    matrices = ConfusionMatrices(counts, num_labels)
    for start in range(0, len(labels), batch_size):
        rows = slice(start, start + batch_size)
        matrices.add([logits[rows] for logits in exit_logits], labels[rows], lambda tensor: tensor)
    return matrices.total


def test_images_per_class():
    exit_logits, labels = torch.randn(2, 60, 4), torch.randint(3, (60,))  # class 3 has no image
    labels[::9] = -100
    known = labels != -100
    matrices = matrices_of(IMAGES, exit_logits, labels, 4)
    for matrix, logits in zip(matrices, [*exit_logits, exit_logits.mean(dim=0)], strict=True):
        predictions = logits.argmax(dim=1)
        expected = confusion_matrix(labels[known], predictions[known], labels=range(4))
        assert np.array_equal(matrix, expected)
    predictions = exit_logits[0].argmax(dim=1)
    recalls = recall_score(labels[known], predictions[known], labels=range(3), average=None)
    scores = IMAGES.score(matrices)
    assert scores[0, :3] == pytest.approx(recalls) and np.isnan(scores[:, 3]).all()
    accuracy = compute_class_metrics(*reduce_class_logits(exit_logits, labels))["exit_1_accuracy"]
    assert np.trace(matrices[1]) / matrices[1].sum() == pytest.approx(accuracy)


def test_probabilities_count_as_their_likeliest_class():
    exit_logits, classes = torch.randn(3, 10, 4), torch.randint(4, (10,))
    soft = 0.9 * torch.nn.functional.one_hot(classes, 4) + 0.025
    soft[0] = 0  # unlabelled
    classes[0] = -100
    assert np.array_equal(matrices_of(IMAGES, exit_logits, soft, 4), matrices_of(IMAGES, exit_logits, classes, 4))


def test_pixels_per_class():
    exit_logits, labels = torch.randn(2, 9, 4, 6, 6), torch.randint(3, (9, 12, 12))
    labels[:, 0] = -100
    matrices = matrices_of(PIXELS, exit_logits, labels, 4, batch_size=4)
    enlarged = torch.nn.functional.interpolate(exit_logits[1], (12, 12), mode="bilinear", align_corners=False)
    known, predictions = labels != -100, enlarged.argmax(dim=1)
    assert np.array_equal(matrices[1], confusion_matrix(labels[known], predictions[known], labels=range(4)))
    scores = PIXELS.score(matrices)
    expected = jaccard_score(labels[known], predictions[known], labels=range(4), average=None, zero_division=0)
    assert scores[1] == pytest.approx(expected)
    metrics = compute_pixel_metrics(reduce_to_pixel_counts(exit_logits, labels))
    assert scores.mean(axis=1) == pytest.approx(
        [metrics[f"{name}_mean_iou"] for name in ("exit_0", "exit_1", "ensemble")]
    )


MATRICES = np.zeros((3, 3, 3), dtype=int)  # of two exits and the ensemble; the last class does not occur
MATRICES[:, :2, :2] = [[[3, 1], [2, 2]], [[4, 0], [0, 4]], [[2, 2], [4, 0]]]
NAMES = ["cat, small", "dög", "none"]


def test_tables(tmp_path):
    rows = class_rows(IMAGES, MATRICES, NAMES)
    scores = {"accuracy (exit 0)": 0.75, "accuracy (exit 1)": 1.0, "accuracy (ensemble)": 0.5}
    assert rows[0] == {"class": "cat, small", "images": 4} | scores
    assert rows[2] == {"class": "none", "images": 0} | dict.fromkeys(scores, "")
    write_class_scores(IMAGES, MATRICES, NAMES, tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in rows]
    write_confusion(MATRICES[0], NAMES, tmp_path / "confusion.csv")
    with open(tmp_path / "confusion.csv", encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header[1:] == NAMES and lines[1] == ["dög", "2", "2", "0"]


@pytest.mark.parametrize("classes", [3, 60])
def test_the_picture(tmp_path, classes):
    plot_confusion(np.eye(classes), [f"class {index}" for index in range(classes)], tmp_path / "confusion.png")
    assert min(Image.open(tmp_path / "confusion.png").size) > 300


def test_a_picture_needs_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"A plot needs matplotlib. Run pip install hf_selfkd.plots."):
        plot_confusion(MATRICES[0], NAMES, tmp_path / "confusion.png")
