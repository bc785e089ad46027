import math

import pytest
import torch
from torch.nn.functional import one_hot
from torch.utils.data import IterableDataset
from torchvision.transforms import v2
from transformers import TrainingArguments

from hf_selfkd import MultiExitOutput, SelfDistillationTrainer, get_method
from hf_selfkd.methods.predictions import Predictions
from tests.helpers.recipe import PLAIN_SGD
from tests.helpers.runs import Augmented, losses, same_weights


def store(num_images, num_classes=2):
    predictions = Predictions(num_classes)
    predictions.allocate(num_images)
    return predictions


def output_of(logits, indices, predictions):
    output = MultiExitOutput(exit_logits=(torch.tensor(logits),), sample_indices=torch.tensor(indices))
    output.scaffold = predictions(None, output)
    return output


def test_two_epochs_by_hand():
    """An image is predicted (1/4, 3/4), which is 0.4 of its target in the second of four epochs."""
    predictions, method = store(3), get_method("ps_kd", alpha=0.8, ramp_epochs=4)
    output = output_of([[0.0, math.log(3)]], [2], predictions)
    label = torch.tensor([0])
    terms = method(output, label, 0.5)
    assert terms["label"].item() == pytest.approx(-0.8 * math.log(1 / 4), abs=1e-6)
    assert terms["logit"].item() == pytest.approx(-0.2 * math.log(1 / 4), abs=1e-6)  # the label in the first epoch
    method.remember(output)
    assert predictions.table.tolist() == [[0, 0], [0, 0], [0.25, 0.75]]
    terms = method(output_of([[0.0, 0.0]], [2], predictions), label, 1.0)
    assert terms["label"].item() == pytest.approx(0.6 * math.log(2), abs=1e-6)
    assert terms["logit"].item() == pytest.approx(0.4 * math.log(2), abs=1e-6)
    terms = method(output_of([[0.0, math.log(7)]], [2], predictions), label, 9.0)  # after the ramp
    assert terms["label"].item() == pytest.approx(-0.2 * math.log(1 / 8), abs=1e-6)
    assert terms["logit"].item() == pytest.approx(-0.8 * (0.25 * math.log(1 / 8) + 0.75 * math.log(7 / 8)), abs=1e-6)


def test_images_without_a_label_have_no_part():
    predictions, method = store(2), get_method("ps_kd", ramp_epochs=1)
    method.remember(output_of([[0.0, 1.0], [2.0, 0.0]], [0, 1], predictions))
    both = method(output_of([[0.3, 0.1], [0.2, 0.9]], [0, 1], predictions), torch.tensor([1, -100]), 2.0)
    alone = method(output_of([[0.3, 0.1]], [0], predictions), torch.tensor([1]), 2.0)
    torch.testing.assert_close(both, alone)
    none = method(output_of([[0.3, 0.1]], [0], predictions), torch.tensor([-100]), 2.0)
    assert none == {"label": 0, "logit": 0}


def test_an_image_that_comes_twice_has_its_first_prediction():
    predictions = store(4)
    rows = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    predictions.keep(torch.tensor([3, 1, 3, 3]), rows)
    expected = torch.zeros(4, 2)
    expected[3], expected[1] = rows[0], rows[1]
    assert torch.equal(predictions.table, expected.half())


def plain_ps_kd(model, batches, alpha, epochs, learning_rate):
    """Train as the authors' loop does, with the exits on the same targets; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    table, found = {}, []
    for epoch, images, labels, indices in batches:
        share = alpha * (epoch + 1) / epochs
        hard = one_hot(labels, 5).float()
        rows = [table.get(index, hard[row]) for row, index in enumerate(indices.tolist())]
        target = (1 - share) * hard + share * torch.stack(rows)
        exits = model(images).exit_logits
        loss = sum(-(target * logits.log_softmax(1)).sum(1).mean() for logits in exits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for index, row in zip(indices.tolist(), exits[-1].detach().softmax(1).half().float(), strict=True):
            table[index] = row
        found.append(loss.item())
    return found


class Recorder(SelfDistillationTrainer):
    """Keeps the batches it trains on."""

    def _training_loss(self, model, images, labels):
        self.seen.append((int(self.state.epoch), images, labels, self._indices))
        return super()._training_loss(model, images, labels)


def test_training_is_that_of_a_plain_loop(build, images, tmp_path):
    args = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    args = TrainingArguments(str(tmp_path), learning_rate=0.01, seed=0, **(PLAIN_SGD | args))
    trainer = Recorder(build("test_vit"), args, get_method("ps_kd", ramp_epochs=3), train_dataset=images)
    trainer.seen = []
    other = build("test_vit").train()
    other.detach_exits = True
    trainer.train()
    expected = plain_ps_kd(other, trainer.seen, 0.8, 3, 0.01)
    assert len(expected) == 9
    assert losses(trainer) == pytest.approx(expected, abs=2e-4)
    assert (trainer.scaffold.table.sum(dim=1).float() - 1).abs().max() < 2e-3


def test_a_run_resumes_bit_for_bit_in_the_middle_of_an_epoch(build, images, train, tmp_path):
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    settings["trainer_kwargs"] = {"train_dataset": Augmented(images)}
    method = get_method("ps_kd", ramp_epochs=2)
    once = train(build("test_vit"), method, **settings)
    resumed = train(build("test_vit"), method, resume=str(tmp_path / "run" / "checkpoint-3"), **settings)
    assert [entry["epoch"] for entry in resumed.state.log_history if "loss" in entry] == [0.5, 1, 1.5, 2]
    assert same_weights(resumed.model, once.model) and losses(resumed) == losses(once)
    assert torch.equal(resumed.scaffold.table, once.scaffold.table)
    assert (once.scaffold.table.sum(dim=1) > 0).all()


def test_a_new_run_forgets_the_one_before(build, train):
    method = get_method("ps_kd", ramp_epochs=1)
    trainer = train(build(), method, max_steps=1)
    trainer.train()
    assert (trainer.scaffold.table.sum(dim=1) > 0).sum() == 5  # one batch, and not that of the first run


def test_combined_with_another_method(build, train):
    method = get_method("byot+ps_kd", ps_kd={"ramp_epochs": 1})
    trainer = train(build(), method)
    assert {"loss/byot/hint", "loss/ps_kd/logit"} <= trainer.state.log_history[0].keys()
    assert (trainer.scaffold["ps_kd"].table.sum(dim=1) > 0).all()


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("Nothing is read.")


def test_errors(build, train, images):
    method = get_method("ps_kd")
    with pytest.raises(ValueError, match="'ps_kd' keeps something for each training image, but Stream has no index"):
        train(build(), method, max_steps=1, trainer_kwargs={"train_dataset": Stream()})
    with pytest.raises(ValueError, match="'eed.ps_kd' keeps something .* but mix makes one image of two"):
        train(build(), "eed+ps_kd", trainer_kwargs={"mix": v2.MixUp(num_classes=5)})
    with pytest.raises(ValueError, match="PSKD was called without its predictions"):
        method(MultiExitOutput(exit_logits=(torch.zeros(1, 5),)), torch.tensor([0]), 0.0)
    output = output_of([[0.0, 1.0]], [0], Predictions(2))
    with pytest.raises(ValueError, match=r"needs the index of every training image.*attach\(model, num_images=...\)"):
        method(output, torch.tensor([0]), 0.0)
    output = MultiExitOutput(exit_logits=(torch.zeros(1, 2),), scaffold={"predictions": store(1)})
    with pytest.raises(ValueError, match="set output.sample_indices"):
        method.remember(output)
    with pytest.raises(ValueError, match="PSKD needs 0 <= alpha <= 1, but got alpha=2"):
        get_method("ps_kd", alpha=2)
    with pytest.raises(ValueError, match="PSKD needs ramp_epochs > 0, but got ramp_epochs=0"):
        get_method("ps_kd", ramp_epochs=0)
