"""Training of segmentation models."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch.testing import assert_close

from hf_selfkd.functional import resize_logits


@pytest.fixture
def maps():
    """Return seven images of 32 pixels with two different halves, and label maps with ignored pixels."""
    samples = []
    for _ in range(7):
        labels = torch.zeros(32, 32, dtype=torch.uint8)
        labels[:, 16:] = 1
        pixels = torch.randn(3, 32, 32) + 2 * labels - 1
        labels[:4] = 11
        samples.append({"pixel_values": pixels, "labels": labels})
    return samples


@pytest.fixture
def train_segmenter(build_segmenter, train, maps):
    def train_segmenter(method, *, model=None, train_dataset=None, eval_dataset=None, **args):
        model = model or build_segmenter(num_labels=3, semantic_loss_ignore_index=11)
        data = {"train_dataset": train_dataset or maps, "eval_dataset": eval_dataset or maps}
        return train(model, method, trainer_kwargs=data, **args)

    return train_segmenter


@pytest.mark.parametrize("method", ["none", "deep_supervision", "frskd"])
def test_terms_add_up_and_metrics_equal_scikit_learn(train_segmenter, maps, method):
    trainer = train_segmenter(method, per_device_eval_batch_size=2)
    logs = trainer.state.log_history[0]
    assert sum(value for name, value in logs.items() if name.startswith("loss/")) == pytest.approx(
        logs["loss"], abs=1e-3
    )
    metrics = trainer.evaluate()
    images = torch.stack([sample["pixel_values"] for sample in maps])
    labels = torch.stack([sample["labels"] for sample in maps])
    with torch.no_grad():
        output = trainer.model.eval()(images, labels)
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    known = labels != 11
    for index, logits in enumerate(output.exit_logits):
        predictions = resize_logits(logits, (32, 32)).argmax(dim=1)
        matrix = confusion_matrix(labels[known], predictions[known], labels=[0, 1, 2])
        union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        mean_iou = (np.diag(matrix)[union > 0] / union[union > 0]).mean()
        assert metrics[f"eval_exit_{index}_mean_iou"] == pytest.approx(mean_iou, abs=1e-3)
        accuracy = np.diag(matrix).sum() / matrix.sum()
        assert metrics[f"eval_exit_{index}_pixel_accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert metrics["eval_mean_iou"] == metrics[f"eval_exit_{index}_mean_iou"]


def test_evaluation_gathers_counts_and_no_label_maps(train_segmenter, maps, monkeypatch):
    trainer = train_segmenter("deep_supervision", max_steps=1)
    gathered = []
    gather = trainer.gather_function
    monkeypatch.setattr(trainer, "gather_function", lambda tensors: gathered.append(tensors) or gather(tensors))
    trainer.args.per_device_eval_batch_size = 7
    trainer.evaluate()
    exits = trainer.model.num_exits
    (counts, losses), loss = gathered
    assert (counts.shape, losses.shape, loss.shape) == ((7, exits + 1, 3, 3), (7, exits), (7,))
    assert trainer.predict(maps).label_ids.shape == (7, 32, 32)


@pytest.mark.slow
def test_learns_the_two_halves(train_segmenter):
    trainer = train_segmenter("frskd", num_train_epochs=12, per_device_train_batch_size=7, learning_rate=0.05)
    losses = [logs["loss/label"] for logs in trainer.state.log_history if "loss/label" in logs]
    assert losses[-1] < losses[0] / 2


def test_predict_returns_the_logits_and_the_same_metrics(train_segmenter, maps):
    trainer = train_segmenter("none")
    metrics = trainer.evaluate()
    prediction = trainer.predict(maps)
    assert prediction.predictions.shape == (7, 3, 8, 8)
    assert prediction.metrics["test_mean_iou"] == pytest.approx(metrics["eval_mean_iou"])


def test_accumulation_gives_the_gradient_of_the_complete_batch(build_segmenter, train_segmenter, maps):
    for sample in maps[::2]:
        sample["labels"][:20] = 11  # other numbers of labelled pixels
    found = []
    for size, steps in ((6, 1), (2, 3)):
        model = build_segmenter(num_labels=3, semantic_loss_ignore_index=11)
        freeze_batch_norm(model)
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        found.append(train_segmenter("none", model=model, train_dataset=maps[:6], **args).model.state_dict())
    assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def freeze_batch_norm(model):
    """Make batch norm use its running statistics in training, which no sample of the batch can change."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train = lambda mode=True, module=module: module
            module.eval()
            module.training = False


def test_image_without_a_labelled_pixel(train_segmenter, maps):
    for sample in maps:
        sample["labels"][:] = 11
    trainer = train_segmenter("frskd")
    assert trainer.state.log_history[0]["loss/label"] == trainer.evaluate()["eval_loss"] == 0
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
