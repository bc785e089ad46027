import numpy as np
import pytest
import torch

from hf_selfkd.evaluation.classification import calibration_error, compute_class_metrics, reduce_class_logits
from hf_selfkd.functional import cross_entropy


def slow_calibration_error(correct, confidence):
    """Sum over fifteen bins, open below and closed above, as Guo et al. write it."""
    error = 0.0
    for start in range(15):
        inside = [index for index, value in enumerate(confidence) if start / 15 < value <= (start + 1) / 15]
        if inside:
            accuracy = sum(correct[index] for index in inside) / len(inside)
            mean = sum(confidence[index] for index in inside) / len(inside)
            error += len(inside) / len(correct) * abs(accuracy - mean)
    return error


def test_the_calibration_error_is_that_of_the_paper():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.01, 1, 500)
    correct = (generator.uniform(size=500) < confidence**2).astype(float)
    assert calibration_error(correct, confidence) == pytest.approx(slow_calibration_error(correct, confidence))
    assert calibration_error(np.ones(4), np.ones(4)) == 0
    assert calibration_error(np.zeros(4), np.ones(4)) == 1
    assert calibration_error(np.zeros(0), np.zeros(0)) == 0


def test_metrics_of_every_exit_and_of_the_ensemble():
    exit_logits = [torch.randn(40, 5) * scale for scale in (1.0, 3.0)]
    labels = torch.randint(5, (40,))
    metrics = compute_class_metrics(*reduce_class_logits(exit_logits, labels))
    names = ("exit_0", "exit_1", "ensemble")
    for name, logits in zip(names, [*exit_logits, (exit_logits[0] + exit_logits[1]) / 2], strict=True):
        confidence, predictions = logits.softmax(dim=1).max(dim=1)
        correct = (predictions == labels).tolist()
        assert metrics[f"{name}_accuracy"] == pytest.approx(sum(correct) / 40)
        error = slow_calibration_error(correct, confidence.tolist())
        assert metrics[f"{name}_calibration_error"] == pytest.approx(error, abs=1e-6)
    for name in ("loss", "accuracy", "calibration_error"):
        assert metrics[name] == metrics[f"exit_1_{name}"]


def test_probabilities_as_labels_count_by_the_largest():
    logits = torch.randn(6, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    smooth = torch.nn.functional.one_hot(labels, 3) * 0.7 + 0.1
    smooth[5] = 0
    found, is_labelled = reduce_class_logits([logits], smooth)
    assert is_labelled.tolist() == [True] * 5 + [False]
    found, smooth, logits, labels = found[:5], smooth[:5], logits[:5], labels[:5]
    assert torch.equal(found[..., 1:], reduce_class_logits([logits], labels)[0][..., 1:])
    assert found[:, 0, 0].mean().item() == pytest.approx(cross_entropy(logits, smooth).item(), rel=1e-5)


def test_images_without_a_label_do_not_count():
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    labels = torch.tensor([0, -100, 1])
    predictions, is_labelled = reduce_class_logits([logits], labels)
    assert predictions.shape == (3, 2, 3) and is_labelled.tolist() == [True, False, True]
    metrics = compute_class_metrics(predictions.numpy(), is_labelled.numpy())
    assert metrics["accuracy"] == 0.5
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, labels).item())
    nothing = compute_class_metrics(predictions.numpy(), np.full(3, False))
    assert set(nothing.values()) == {0.0}
