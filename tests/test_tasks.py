from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainingArguments

from hf_selfkd import MultiExitForSemanticSegmentation
from hf_selfkd.tasks import TASKS, task_of
from hf_selfkd.training.settings import own_arguments

CLASSES, PIXELS, LABEL_SETS = (
    TASKS[name] for name in ("image-classification", "image-segmentation", "multi-label-classification")
)
MULTI_LABEL = {"problem_type": "multi_label_classification"}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
CONFIG = SimpleNamespace(num_labels=5, semantic_loss_ignore_index=11)
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
        return model, exit_logits, task.convert_labels(labels, model.config, NAME)

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
def test_the_rule_for_the_best_model_is_right_for_every_metric(task):
    """By transformers' rule the end of a name tells whether greater is better."""
    labels = (torch.arange(64) % 2).reshape(1, 8, 8) if task is PIXELS else torch.arange(4) % 2
    one_hot = torch.nn.functional.one_hot(labels, 5).movedim(-1, 1).float()
    labels, perfect = (one_hot, 3 * one_hot - 1) if task is LABEL_SETS else (labels, 3 * one_hot)
    good, bad = (
        task.compute_metrics(*task.reduce_logits([logits, logits], labels)) for logits in (3 * perfect, -3 * perfect)
    )
    for name in good:
        args = own_arguments(TrainingArguments(use_cpu=True, metric_for_best_model=f"eval_{name}"))
        assert args.greater_is_better is (good[name] > bad[name]), name
        assert good[name] != bad[name], name


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


@every_task
def test_the_check_of_a_task_is_that_of_its_labels(task):
    """What they accept is in tests/models/test_labels.py."""
    image, pixels = torch.tensor([3]), torch.full((1, 8, 8), 11, dtype=torch.uint8)
    label_set = torch.tensor([[1, 0, 1, 0, -100]])
    good, bad, expected = {
        CLASSES.name: (image, pixels, image),
        PIXELS.name: (pixels, image, torch.full((1, 8, 8), -100)),
        LABEL_SETS.name: (label_set, image, torch.tensor([[1, 0, 1, 0, torch.nan]])),
    }[task.name]
    assert_close(task.convert_labels(good, CONFIG, NAME, (8, 8)), expected, equal_nan=True)
    with pytest.raises(ValueError, match=f"^{NAME} has the label"):
        task.convert_labels(bad, CONFIG, NAME, (8, 8))
    assert (task.convert_labels(good + 50, CONFIG, NAME, check_values=False) > 5).any()
