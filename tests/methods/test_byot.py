import pytest
import torch
import torch.nn.functional as F

from hf_selfkd import MultiExitOutput, get_method
from hf_selfkd.functional import add, cross_entropy, mse, soften_kl


def total(method, output, labels):
    return add(method(output, labels, 0.0).values())


@pytest.mark.parametrize(
    "name", ["byot.total.spec_default", "byot.total.spec_no_T2", "byot.total.a0.1_lam1e-6_sum_T2"]
)
def test_total_of_the_vectors(exits_of_vectors, vector, name):
    output, labels = exits_of_vectors
    inputs, expected = vector(name)
    temperature = inputs["temperature"].item()
    elements = output.exit_features[0].numel() if inputs["hint"] == "sum" else 1
    method = get_method(
        "byot", alpha=inputs["alpha"].item(), temperature=temperature, hint_weight=inputs["lam"].item() * elements
    )
    terms = method(output, labels, 0.0)
    if not inputs["t_squared"]:
        terms["logit"] = terms["logit"] / temperature**2
    assert add(terms.values()).item() == pytest.approx(expected.item(), abs=1e-5)


def test_defaults_are_those_of_the_vectors(exits_of_vectors, vector):
    _, expected = vector("byot.total.spec_default")
    assert total(get_method("byot"), *exits_of_vectors).item() == pytest.approx(expected.item(), abs=1e-5)


def soft_cross_entropy(logits, target, temperature):
    return cross_entropy(logits / temperature, (target / temperature).softmax(dim=1))


def test_unofficial_repository(exits_of_vectors, vector):
    output, labels = exits_of_vectors
    _, expected = vector("byot.total.unofficial_repo")
    *early, final = output.exit_logits
    *features, target = output.exit_features
    value = 0.9 * add(cross_entropy(logits, labels) for logits in output.exit_logits)
    value += 0.1 * 9 * add(soft_cross_entropy(logits, final, 3) for logits in early)
    value += 1e-6 * add(mse(feature, target) * target.numel() for feature in features)
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_author_repository(exits_of_vectors, vector):
    output, labels = exits_of_vectors
    _, expected = vector("byot.total.author_repo")
    *early, final = output.exit_logits
    *features, target = output.exit_features
    value = cross_entropy(final, labels)
    value += add(0.7 * cross_entropy(z, labels) + 0.3 * soft_cross_entropy(z, final, 3) for z in early)
    value += 0.03 * add((feature - target).norm() for feature in features[:2])
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_hint_reductions(exits_of_vectors, vector):
    output, _ = exits_of_vectors
    _, expected = vector("byot.hint_reductions")
    *features, target = output.exit_features
    means = torch.stack([mse(feature, target) for feature in features])
    sums = means * target.numel()
    found = {"mean": means, "sum": sums, "batchmean": sums / len(target), "whole_batch_norm": sums.sqrt()}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_hint_mask_of_the_unofficial_repository(vector):
    inputs, expected = vector("byot.hint_mask_signed")
    kept = (inputs["student"] > 0) | (inputs["target"] > 0)
    assert (F.mse_loss(inputs["student"], inputs["target"], reduction="none") * kept).sum() == expected


def test_final_exit_learns_from_the_labels_alone(exits_of_vectors, vector):
    output, labels = exits_of_vectors
    _, expected = vector("byot.grad_deepest_logits")
    _, no_gradient = vector("byot.grad_deepest_features_from_hint")
    final, feature = (t[-1].requires_grad_() for t in (output.exit_logits, output.exit_features))
    gradients = torch.autograd.grad(
        total(get_method("byot"), output, labels), (final, feature), allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(gradients[0], expected, atol=1e-5, rtol=0)
    assert gradients[1].abs().sum() == no_gradient


def test_without_distillation_it_is_deep_supervision(exits_of_vectors):
    output, labels = exits_of_vectors
    plain = total(get_method("byot", alpha=0, hint_weight=0), output, labels)
    torch.testing.assert_close(plain, total(get_method("deep_supervision"), output, labels))


def test_duplicating_the_batch_changes_nothing(exits_of_vectors):
    output, labels = exits_of_vectors
    twice = MultiExitOutput(
        exit_logits=tuple(t.repeat(2, 1) for t in output.exit_logits),
        exit_features=tuple(t.repeat(2, 1) for t in output.exit_features),
    )
    once = get_method("byot")(output, labels, 0.0)
    for name, term in get_method("byot")(twice, labels.repeat(2), 0.0).items():
        torch.testing.assert_close(term, once[name])


def test_a_mask_changes_nothing_for_features_after_relu(exits_of_vectors):
    output, _ = exits_of_vectors
    *features, target = output.exit_features
    for feature in features:
        kept = (feature > 0) | (target > 0)
        assert torch.equal(((feature - target) ** 2 * kept).mean(), ((feature - target) ** 2).mean())


def test_ensemble_is_the_mean_of_logits(exits_of_vectors, vector):
    output, _ = exits_of_vectors
    _, expected = vector("exits.ensemble_logits")
    torch.testing.assert_close(output.ensemble_logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"alpha": 1.5}, "BYOT needs 0 <= alpha <= 1, but got alpha=1.5."),
        ({"temperature": 0}, "BYOT needs temperature > 0, but got temperature=0."),
        ({"hint_weight": -1}, "BYOT needs hint_weight >= 0, but got hint_weight=-1."),
        ({"alpha": "x"}, "BYOT needs 0 <= alpha <= 1, but got alpha='x'."),
    ],
)
def test_values_out_of_range(value, words):
    with pytest.raises(ValueError) as error:
        get_method("byot", **value)
    assert str(error.value) == words


def test_kl_of_an_early_exit_weighs_alpha(exits_of_vectors):
    output, labels = exits_of_vectors
    *early, final = output.exit_logits
    expected = 0.5 * sum(soften_kl(logits, final, 2.0).item() for logits in early)
    terms = get_method("byot", alpha=0.5, temperature=2.0)(output, labels, 0.0)
    assert terms["logit"].item() == pytest.approx(expected, rel=1e-6)
