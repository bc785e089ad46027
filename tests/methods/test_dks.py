import math

import pytest
import torch

from hf_selfkd import MultiExitOutput, get_method


def exits_of(*probabilities):
    """Return an output of one image whose exits predict these probabilities."""
    return MultiExitOutput(exit_logits=tuple(torch.tensor([row]).log() for row in probabilities))


def test_two_exits_by_hand():
    terms = get_method("dks")(exits_of((0.5, 0.5), (0.25, 0.75)), torch.tensor([1]), 0.0)
    forth = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    back = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert terms["label"].item() == pytest.approx(-math.log(0.5) - math.log(0.75), abs=1e-6)
    assert terms["synergy"].item() == pytest.approx(forth + back, abs=1e-6)


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 3.0)])
def test_every_exit_is_pulled_to_every_other_one(exits_of_vectors, weight, temperature):
    output, labels = exits_of_vectors
    output.exit_logits = tuple(logits.requires_grad_() for logits in output.exit_logits)
    terms = get_method("dks", synergy_weight=weight, temperature=temperature)(output, labels, 0.0)
    terms["synergy"].backward()
    soft = [(logits.detach() / temperature).softmax(dim=1) for logits in output.exit_logits]
    value = sum((a * (a / b).log()).sum(dim=1).mean() for a in soft for b in soft)
    torch.testing.assert_close(terms["synergy"].detach(), weight * temperature**2 * value)
    for logits, own in zip(output.exit_logits, soft, strict=True):
        pull = sum(own - other for other in soft) * weight * temperature / len(labels)
        torch.testing.assert_close(logits.grad, pull, atol=1e-6, rtol=1e-5)


def test_exits_that_agree_and_no_synergy_are_deep_supervision(exits_of_vectors):
    output, labels = exits_of_vectors
    plain = get_method("deep_supervision")(output, labels, 0.0)["label"]
    terms = get_method("dks", synergy_weight=0)(output, labels, 0.0)
    assert torch.equal(terms["label"], plain) and terms["synergy"] == 0
    output.exit_logits = output.exit_logits[-1:] * 3
    assert get_method("dks")(output, labels, 0.0)["synergy"].item() == pytest.approx(0, abs=1e-6)


def test_errors(build):
    with pytest.raises(ValueError, match="DKS needs synergy_weight >= 0, but got synergy_weight=-1"):
        get_method("dks", synergy_weight=-1)
    with pytest.raises(ValueError, match="DKS needs temperature > 0, but got temperature=0"):
        get_method("dks", temperature=0)
    with pytest.raises(ValueError, match="DKS needs at least 2 exits, but the model has 1"):
        get_method("dks").attach(build(exits=[]))
