"""Sums of the loss and its terms since the last log entry."""

from types import SimpleNamespace

import pytest
import torch

from hf_selfkd.training.loss_sums import LossSums


@pytest.fixture
def trainer():
    """Return the part of a trainer that holds such sums, at step 4, with a log entry at step 2."""
    return SimpleNamespace(
        args=SimpleNamespace(device="cpu"),
        accelerator=SimpleNamespace(gather=lambda tensor: tensor),
        _tr_loss=torch.tensor(6.0),
        _globalstep_last_logged=2,
        _total_loss_scalar=10.0,
        _initial_global_step=0,
    )


def test_means_are_over_steps_whatever_their_micro_batches(trainer):
    sums = LossSums(trainer)
    for value, share in ((1.0, 0.5), (3.0, 0.5), (8.0, 1.0)):
        sums.add({"loss/label": torch.tensor(value), "loss/logit": torch.tensor(1.0)}, share)
    assert sums.pop_means() == {"loss/label": 5.0, "loss/logit": 1.0}
    assert sums.pop_means() == {}


def test_a_skipped_step_is_in_no_mean(trainer):
    sums = LossSums(trainer)
    sums.add({"loss/label": torch.tensor(2.0)}, 1.0)
    before = sums.snapshot()
    trainer._tr_loss += float("nan")
    sums.add({"loss/label": torch.tensor(float("nan"))}, 1.0)
    sums.skip_step(before)
    assert (trainer._tr_loss, trainer._globalstep_last_logged, trainer._initial_global_step) == (6.0, 3, 1)
    assert sums.pop_means() == {"loss/label": 2.0}


def test_sums_are_restored_in_another_run(trainer):
    sums = LossSums(trainer)
    sums.add({"loss/label": torch.tensor(2.0)}, 1.0)
    state = sums.state_dict()
    sums.pop_means()
    trainer._tr_loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = torch.tensor(0.0), 0.0, 4
    sums.load_state_dict(state)
    assert (trainer._tr_loss, trainer._globalstep_last_logged) == (6.0, 2)
    assert trainer._total_loss_scalar == -6.0  # of steps before this call, which its mean excludes
    assert sums.pop_means() == {"loss/label": 2.0}
