from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import torch

from hf_selfkd import MultiExitAccuracy, MultiExitAveragePrecision
from hf_selfkd.evaluation.classification import compute_class_metrics, reduce_class_logits
from hf_selfkd.evaluation.multi_label import compute_binary_metrics, reduce_binary_logits


@pytest.fixture
def predictions():
    """Return logits of three exits for twenty images, and labels, one of them missing."""
    labels = torch.arange(20) % 4
    labels[3] = -100
    exit_logits = [torch.randn(20, 4) + torch.eye(4)[torch.arange(20) % 4] * k for k in (0.5, 1, 2)]
    return torch.stack(exit_logits, dim=1).numpy(), labels.numpy()


@pytest.fixture
def expected(predictions):
    """Return the metrics of the trainer."""
    logits, labels = map(torch.tensor, predictions)
    return compute_class_metrics(*reduce_class_logits(logits.unbind(dim=1), labels))


@pytest.fixture
def metric(tmp_path):
    return MultiExitAccuracy(cache_dir=str(tmp_path))


def test_values_equal_those_of_the_trainer(metric, predictions, expected):
    logits, labels = predictions
    assert metric.compute(predictions=logits, references=labels) == pytest.approx(expected)
    assert 0 < expected["exit_0_accuracy"] < expected["exit_2_accuracy"]


def test_batches_and_single_images_add_up(metric, predictions, expected, tmp_path):
    logits, labels = predictions
    for start in range(0, 20, 8):
        metric.add_batch(predictions=logits[start : start + 8].tolist(), references=labels[start : start + 8].tolist())
    assert metric.compute() == pytest.approx(expected)
    in_memory = MultiExitAccuracy(keep_in_memory=True, cache_dir=str(tmp_path))
    for image, label in zip(logits, labels, strict=True):
        in_memory.add(prediction=torch.tensor(image), reference=int(label))
    assert in_memory.compute() == pytest.approx(expected)
    assert in_memory.compute(predictions=logits, references=labels) == pytest.approx(expected)  # it starts again


class Confidence(evaluate.Metric):
    """Another metric of the same logits."""

    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", features=MultiExitAccuracy(keep_in_memory=True).features
        )

    def _compute(self, predictions, references):
        return {"largest": float(np.max(predictions)), "accuracy": 0.0}


def test_combined_with_another_metric(predictions, expected, tmp_path):
    logits, labels = predictions
    metrics = [metric(cache_dir=str(tmp_path)) for metric in (MultiExitAccuracy, Confidence)]
    combined = evaluate.combine(metrics)
    for add in (combined.add_batch, None):
        if add is not None:
            add(predictions=logits.tolist(), references=labels.tolist())
        else:
            for image, label in zip(logits.tolist(), labels.tolist(), strict=True):
                combined.add(image, label)
        found = combined.compute()
        assert found["largest"] == pytest.approx(logits.max())
        assert found["multi_exit_accuracy_accuracy"] == pytest.approx(expected["accuracy"])  # both have that name
        assert found["exit_0_accuracy"] == pytest.approx(expected["exit_0_accuracy"])


def test_processes_share_the_work(predictions, expected, tmp_path):
    logits, labels = predictions

    def work(process):
        metric = MultiExitAccuracy(num_process=2, process_id=process, experiment_id="run", cache_dir=str(tmp_path))
        return metric.compute(predictions=logits[process::2], references=labels[process::2])

    with ThreadPoolExecutor(2) as pool:
        found, nothing = pool.map(work, range(2))
    assert nothing is None
    assert found == pytest.approx(expected)


def test_shapes_that_do_not_fit(metric, predictions):
    logits, labels = predictions
    with pytest.raises(
        ValueError, match=r"needs logits shaped \(images, exits, classes\) .* but got \(20, 4\) and \(20,"
    ):
        metric.add_batch(predictions=logits[:, 0], references=labels)
    with pytest.raises(ValueError, match=r"got \(3, 20, 4\) and \(20,\). Stack the exits' logits along dimension 1"):
        metric.add_batch(predictions=np.swapaxes(logits, 0, 1), references=labels)


def test_multi_label_values_equal_those_of_the_trainer(tmp_path):
    labels = (torch.rand(20, 4) > 0.6).long()
    labels[3, 1] = -100
    exit_logits = [torch.randn(20, 4) + skill * labels.clamp(min=0) for skill in (0.5, 2)]
    expected = compute_binary_metrics(*reduce_binary_logits(exit_logits, labels))
    logits = torch.stack(exit_logits, dim=1)
    metric = MultiExitAveragePrecision(cache_dir=str(tmp_path))
    assert metric.compute(predictions=logits, references=labels) == pytest.approx(expected)
    for start in range(0, 16, 8):
        metric.add_batch(predictions=logits[start : start + 8].numpy(), references=labels[start : start + 8].numpy())
    for image, label in zip(logits[16:], labels[16:], strict=True):
        metric.add(prediction=image, reference=label)
    assert metric.compute() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"and labels shaped \(images, classes\), but got \(20, 2, 4\) and \(20,\)"):
        metric.add_batch(predictions=logits, references=labels[:, 0])
