"""The example of an own method: its loss, and a run as a user runs it."""

import ast
import contextlib
import io
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from hf_selfkd import MultiExitOutput, get_method

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "write_your_own_method.py"


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory):
    """Run the example, which registers its method, and return the accuracies that it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(tmp_path_factory.mktemp("ladder"))
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return ast.literal_eval(printed.getvalue().splitlines()[-1])


def test_every_exit_is_better_than_chance(accuracies):
    assert len(accuracies) == 6  # the final exit, each of the four, and their ensemble
    assert min(accuracies.values()) > 0.2  # ten classes


def test_every_early_exit_learns_from_the_next(accuracies):
    exit_logits = [torch.randn(8, 5, requires_grad=True) for _ in range(3)]
    labels = torch.arange(8) % 5
    terms = get_method("ladder")(MultiExitOutput(exit_logits=tuple(exit_logits)), labels, epoch=0.0)
    assert_close(terms["label"], sum(cross_entropy(logits, labels) for logits in exit_logits))
    gradients = torch.autograd.grad(terms["step"], exit_logits, allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1].abs().sum() > 0
    assert gradients[2] is None  # the teacher of the second exit, which learns from the labels alone
    alike = MultiExitOutput(exit_logits=(exit_logits[0],) * 3)
    assert_close(get_method("ladder")(alike, labels, epoch=0.0)["step"], torch.tensor(0.0))
