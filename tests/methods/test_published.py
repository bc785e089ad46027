"""Training with this library is training with the published loss: same network, same seeds, same recipe, same numbers.

The other side is `benchmarks/published.py`, bare PyTorch without hooks, Trainer or this library's arithmetic.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hf_selfkd import SelfDistillationTrainer
from tests.helpers.methods import METHODS
from tests.helpers.recipe import PLAIN_SGD

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import published

NETWORK = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32]}
STEPS = 3
# Few and small, because kinks amplify rounding errors: after five steps of 0.01 float32 is a percent off float64.
LEARNING_RATE = 3e-4


def test_every_method_of_the_papers_has_its_published_loss():
    # The teacher of kd is another network, that of ps_kd the epoch before: see their own tests.
    assert set(METHODS) - set(published.LOSSES) == {"kd", "ps_kd"}


class Recorder(SelfDistillationTrainer):
    """Keeps the batches it trains on, and their epochs."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append((inputs, self.state.epoch))
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("method", published.LOSSES)
def test_the_trainer_logs_the_published_loss_and_ends_with_its_weights(build, images, tmp_path, method):
    args = PLAIN_SGD | {"per_device_train_batch_size": 10, "lr_scheduler_type": "constant"}
    args = TrainingArguments(tmp_path, max_steps=STEPS, learning_rate=LEARNING_RATE, **args)
    trainer = Recorder(
        build("resnet18", backbone_kwargs=NETWORK, small_input_stem=True), args, method, train_dataset=images
    )
    other, trainer.seen = copy.deepcopy(trainer.model), []
    start = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    trainer.train()
    batches, epochs = zip(*trainer.seen, strict=True)
    losses = published.train(other, method, batches, torch.optim.SGD(other.parameters(), lr=LEARNING_RATE), epochs)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    torch.testing.assert_close(torch.tensor(logged), torch.stack(losses), rtol=1e-4, atol=0)
    trainer.model.scaffold = trainer.scaffold  # which came off when training ended
    trained = dict(trainer.model.named_parameters())
    assert trained.keys() == start.keys()
    moved = join(trained[name] - start[name] for name in start)
    apart = join(trained[name] - parameter for name, parameter in other.named_parameters())
    assert apart.norm() <= 0.05 * moved.norm()  # kinks amplify rounding errors


def join(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
