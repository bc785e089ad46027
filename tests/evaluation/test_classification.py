import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_selfkd.evaluation.classification import (
    calibration_error,
    compute_exit_metrics,
    reduce_to_answers,
    reduce_to_exit_metrics,
    summarise_answers,
)
from hf_selfkd.functional import cross_entropy


def slow_calibration_error(right, confidence):
    """Sum over fifteen bins, open below and closed above, as Guo et al. write it."""
    error = 0.0
    for start in range(15):
        inside = [index for index, value in enumerate(confidence) if start / 15 < value <= (start + 1) / 15]
        if inside:
            accuracy = sum(right[index] for index in inside) / len(inside)
            mean = sum(confidence[index] for index in inside) / len(inside)
            error += len(inside) / len(right) * abs(accuracy - mean)
    return error


def test_the_calibration_error_is_that_of_the_paper():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.01, 1, 500)
    right = (generator.uniform(size=500) < confidence**2).astype(float)
    assert calibration_error(right, confidence) == pytest.approx(slow_calibration_error(right, confidence))
    assert calibration_error(np.ones(4), np.ones(4)) == 0
    assert calibration_error(np.zeros(4), np.ones(4)) == 1
    assert calibration_error(np.zeros(0), np.zeros(0)) == 0


def test_answers_of_every_exit_and_of_their_mean():
    exit_logits = [torch.randn(40, 5) * scale for scale in (1.0, 3.0)]
    labels = torch.randint(5, (40,))
    metrics = summarise_answers(reduce_to_answers(exit_logits, labels).numpy())
    names = ("exit_0", "exit_1", "ensemble")
    for name, logits in zip(names, [*exit_logits, (exit_logits[0] + exit_logits[1]) / 2], strict=True):
        confidence, answers = logits.softmax(dim=1).max(dim=1)
        right = (answers == labels).tolist()
        assert metrics[f"accuracy_{name}"] == pytest.approx(sum(right) / 40)
        error = slow_calibration_error(right, confidence.tolist())
        assert metrics[f"calibration_error_{name}"] == pytest.approx(error, abs=1e-6)
    for name in ("loss", "accuracy", "calibration_error"):
        assert metrics[name] == metrics[f"{name}_exit_1"]


def test_probabilities_as_labels_count_by_the_largest():
    logits = torch.randn(6, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    smooth = torch.nn.functional.one_hot(labels, 3) * 0.7 + 0.1
    found = reduce_to_answers([logits], smooth)
    assert torch.equal(found[..., 1:], reduce_to_answers([logits], labels)[..., 1:])
    assert found[:, 0, 0].mean().item() == pytest.approx(cross_entropy(logits, smooth).item(), rel=1e-5)


def test_metrics_leave_out_what_has_no_label():
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    labels = torch.tensor([0, -100, 1])
    reduced = reduce_to_exit_metrics((logits, (logits,)), labels)
    assert reduced.shape == (3, 2, 3)
    metrics = compute_exit_metrics(EvalPrediction(predictions=reduced.numpy(), label_ids=labels.numpy()))
    assert metrics["accuracy"] == 0.5
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, labels).item())
    nothing = compute_exit_metrics(EvalPrediction(predictions=reduced.numpy(), label_ids=np.full(3, -100)))
    assert nothing["accuracy"] == 0
