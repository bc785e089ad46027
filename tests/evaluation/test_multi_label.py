"""The metrics of multi-label models are those of scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from hf_selfkd.evaluation.multi_label import (
    average_precision,
    compute_binary_metrics,
    mean_average_precision,
    reduce_binary_logits,
)
from hf_selfkd.functional import binary_cross_entropy


@pytest.fixture
def predicted():
    """Return logits of three exits for forty images, and the labels of each."""
    labels = (torch.rand(40, 6) > 0.7).float()
    labels[:6] = torch.eye(6)  # every class occurs
    return [torch.randn(40, 6) + skill * labels for skill in (0.5, 1, 2)], labels


def metrics_of(exit_logits, labels):
    return compute_binary_metrics(*(tensor.numpy() for tensor in reduce_binary_logits(exit_logits, labels)))


@pytest.mark.parametrize("decimals", [8, 1, 0])  # the fewer, the more images with the same score
def test_average_precision_is_that_of_scikit_learn(decimals):
    generator = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9, 1.0):
        is_positive = generator.random(200) < share
        is_positive[7] = True
        scores = (generator.normal(size=200) + is_positive).round(decimals).astype(np.float32)
        expected = average_precision_score(is_positive, scores)
        assert average_precision(scores, is_positive) == pytest.approx(expected, abs=1e-12)


def test_metrics_of_every_exit_are_those_of_scikit_learn(predicted):
    exit_logits, labels = predicted
    metrics = metrics_of(exit_logits, labels.long())
    parts = {f"exit_{exit}_": logits for exit, logits in enumerate(exit_logits)}
    for prefix, logits in (parts | {"": exit_logits[-1], "ensemble_": torch.stack(exit_logits).mean(dim=0)}).items():
        expected = average_precision_score(labels, logits, average="macro")
        assert metrics[f"{prefix}mean_average_precision"] == pytest.approx(expected)
        assert metrics[f"{prefix}f1"] == pytest.approx(f1_score(labels, logits > 0, average="micro"))
        assert metrics[f"{prefix}accuracy"] == pytest.approx(accuracy_score(labels, logits > 0))
        if prefix != "ensemble_":
            assert metrics[f"{prefix}loss"] == pytest.approx(binary_cross_entropy(logits, labels).item(), rel=1e-6)
    assert "ensemble_loss" not in metrics


def test_unknown_labels_are_left_out(predicted):
    exit_logits, labels = predicted
    known = torch.rand(40, 6) > 0.3
    known[5:8] = False
    partial = torch.where(known, labels, -100)
    metrics = metrics_of(exit_logits, partial)
    assert metrics == metrics_of(exit_logits, torch.where(known, labels, torch.nan))
    logits, rows = exit_logits[-1], known.any(dim=1)
    classes = [average_precision_score(labels[k, c], logits[k, c]) for c, k in enumerate(known.T)]
    assert metrics["mean_average_precision"] == pytest.approx(np.mean(classes))
    assert metrics["f1"] == pytest.approx(f1_score(labels[known], logits[known] > 0))
    exact = (((logits > 0) == (labels == 1)) | ~known).all(dim=1)[rows]
    assert metrics["accuracy"] == pytest.approx(exact.float().mean().item())
    assert metrics["loss"] == pytest.approx(binary_cross_entropy(logits, partial).item(), rel=1e-6)


def test_classes_that_no_image_has_are_left_out_of_the_mean():
    scores, labels = torch.randn(20, 3).numpy(), (torch.rand(20, 3) > 0.5).float().numpy()
    labels[:, 1] = 0
    expected = np.mean([average_precision_score(labels[:, c], scores[:, c]) for c in (0, 2)])
    assert mean_average_precision(scores, labels) == pytest.approx(expected)


def test_without_labels_all_metrics_are_0(predicted):
    exit_logits, labels = predicted
    metrics = metrics_of(exit_logits, torch.full_like(labels, -100))
    assert set(metrics.values()) == {0.0}


def test_probabilities_count_as_the_more_probable_outcome(predicted):
    exit_logits, labels = predicted
    soft, hard = metrics_of(exit_logits, 0.8 * labels + 0.1), metrics_of(exit_logits, labels)
    for name in ("mean_average_precision", "f1", "accuracy"):
        assert soft[f"exit_0_{name}"] == hard[f"exit_0_{name}"]
    assert soft["loss"] != hard["loss"]
