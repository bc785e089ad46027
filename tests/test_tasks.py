from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hf_selfkd import MultiExitForSemanticSegmentation
from hf_selfkd.tasks import TASKS, task_of

CLASSES, PIXELS, LABEL_SETS = (
    TASKS[name] for name in ("image-classification", "image-segmentation", "multi-label-classification")
)
MULTI_LABEL = {"problem_type": "multi_label_classification"}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
CONFIG = SimpleNamespace(num_labels=5, semantic_loss_ignore_index=11)
SAMPLE = {"pixel_values": torch.zeros(3, 8, 8)}
NAME = "Sample 1 of the training data"


@pytest.fixture
def output_of(build, build_segmenter, batch):
    """Return the logits of all exits of a small model of a task, and labels with ignored ones among them."""

    def output_of(task):
        if task is PIXELS:
            model, labels = build_segmenter(), torch.randint(0, 5, (8, 32, 32))
        else:
            model = build(**(MULTI_LABEL if task is LABEL_SETS else {}))
            labels = batch["labels"] if task is CLASSES else torch.randint(0, 2, (8, 5))
        model.eval()
        labels[1] = model.config.semantic_loss_ignore_index if task is PIXELS else -100
        with torch.no_grad():
            exit_logits = model(batch["pixel_values"]).exit_logits
        return model, exit_logits, task.prepare_labels(labels, model.config)

    return output_of


@every_task
def test_models_name_their_task(task, output_of):
    model, _, _ = output_of(task)
    assert task_of(model) is task
    assert task.pipeline_tag in model.model_tags


def test_every_model_has_a_task(build):
    named = {build().task, build(**MULTI_LABEL).task, MultiExitForSemanticSegmentation.task}
    assert named == TASKS.keys()


@every_task
def test_metrics_are_those_with_a_title_and_the_loss(task, output_of):
    _, exit_logits, labels = output_of(task)
    metrics = task.compute_metrics(*task.reduce_logits(exit_logits, labels))
    exits = [f"exit_{exit}" for exit in range(len(exit_logits))]
    titled = {f"{name}_{metric}" for metric in task.metric_titles for name in (*exits, "ensemble")}
    losses = {"loss", *(f"{name}_loss" for name in exits)}
    assert metrics.keys() == titled | losses | set(task.metric_titles)
    assert task.metric in metrics


@every_task
def test_metrics_of_batches_are_those_of_all_images(task, output_of):
    _, exit_logits, labels = output_of(task)
    together = task.compute_metrics(*task.reduce_logits(exit_logits, labels))
    parts = [
        task.reduce_logits([logits[rows] for logits in exit_logits], labels[rows])
        for rows in (slice(0, 3), slice(3, 8))
    ]
    arrays = [torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True)]
    assert all(len(array) == 8 for array in arrays)
    assert task.compute_metrics(*arrays) == pytest.approx(together, rel=1e-6)


def test_ignored_pixels_become_minus_100():
    labels = torch.tensor([[[0, 11], [-100, 4]]], dtype=torch.int16)
    assert_close(PIXELS.prepare_labels(labels, CONFIG), torch.tensor([[[0, -100], [-100, 4]]]))
    assert CLASSES.prepare_labels(labels, CONFIG) is labels


# Labels of samples


@pytest.mark.parametrize("label", [3, -100, np.int64(4), torch.tensor(2), True, [0.2] * 5, torch.full((5,), 0.2)])
def test_classes_and_probabilities_are_accepted(label):
    CLASSES.check_label(label, SAMPLE, CONFIG, NAME)


@pytest.mark.parametrize(
    "label",
    [
        *("cat", None, 1.0, torch.tensor(1.0), [1, 0, 0, 0, 0], [0.5, 0.5], torch.zeros(5, dtype=torch.long), {}),
        torch.zeros(8, 8, dtype=torch.long),
    ],
)
def test_labels_of_the_wrong_type_are_refused(label):
    words = (
        "^Sample 1 of the training data has the label .*, but a label is a class index or 5 probabilities. Use -100"
    )
    with pytest.raises(ValueError, match=words):
        CLASSES.check_label(label, SAMPLE, CONFIG, NAME)


@pytest.mark.parametrize("label", [5, -1, 255])
def test_classes_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match=rf"^{NAME} has label {label}, but the model has 5 classes \(0 to 4\)"):
        CLASSES.check_label(label, SAMPLE, CONFIG, NAME)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long])
def test_label_maps_are_accepted(dtype):
    label = (torch.arange(64).reshape(8, 8) % 5).to(dtype)
    label[0] = 11
    PIXELS.check_label(label, SAMPLE, CONFIG, NAME)
    PIXELS.check_label(label.numpy(), SAMPLE, CONFIG, NAME)
    PIXELS.check_label(torch.full((8, 8), -100), SAMPLE, CONFIG, NAME)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (3, f"^{NAME} has the label 3, but a label is a map of class indices, .* Mark pixels without a class with 11"),
        (torch.zeros(4, 8), rf"^{NAME} has a label map of \(4, 8\) pixels, but an image of \(8, 8\)"),
        (torch.full((8, 8), 7), rf"^{NAME} has a pixel of class 7, but the model has 5 classes .* and ignores 11"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused(label, words):
    with pytest.raises(ValueError, match=words):
        PIXELS.check_label(label, SAMPLE, CONFIG, NAME)
