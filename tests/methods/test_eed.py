import pytest
import torch

from hf_selfkd import MultiExitOutput, get_method
from hf_selfkd.functional import add, cross_entropy, mse, soften_kl


def total(method, output, labels):
    return add(method(output, labels, 0.0).values())


def soft_cross_entropy(logits, target, temperature):
    return cross_entropy(logits / temperature, (target / temperature).softmax(dim=1))


def test_targets_are_plain_means_over_all_exits(exits_of_vectors, vector):
    output, _ = exits_of_vectors
    _, expected = vector("eed.targets")
    torch.testing.assert_close(output.ensemble_logits, expected["logits"], atol=1e-6, rtol=0)
    features = torch.stack(output.exit_features).mean(dim=0)
    torch.testing.assert_close(features, expected["features"], atol=1e-6, rtol=0)
    for kind, target in (("output", output.ensemble_logits), ("feature", features)):
        _, distances = vector(f"eed.{kind}_mse")
        students = output.exit_logits if kind == "output" else output.exit_features
        found = torch.stack([mse(student, target) for student in students])
        torch.testing.assert_close(found, distances, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "hyper_parameters"),
    [
        ("eed.total.mse_feat", {}),
        ("eed.total.mse_only", {"feature_weight": 0}),
        ("eed.total.kl_true", {"output_loss": "kl"}),
    ],
)
def test_total_of_the_vectors(exits_of_vectors, vector, name, hyper_parameters):
    _, expected = vector(name)
    value = total(get_method("eed", **hyper_parameters), *exits_of_vectors)
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_soft_cross_entropy_variant_of_the_authors(exits_of_vectors, vector):
    output, labels = exits_of_vectors
    _, expected = vector("eed.total.kl_variant")
    terms = get_method("eed", output_weight=0)(output, labels, 0.0)
    soft = 0.1 * 9 * add(soft_cross_entropy(z, output.ensemble_logits, 3) for z in output.exit_logits)
    assert (add(terms.values()) + soft).item() == pytest.approx(expected.item(), abs=1e-5)


def test_ablation_with_the_final_exit_as_teacher(exits_of_vectors, vector):
    output, labels = exits_of_vectors
    _, expected = vector("eed.total.teacher_is_final_exit")
    value = add(cross_entropy(z, labels) for z in output.exit_logits)
    for students in (output.exit_logits, output.exit_features):
        value += add(mse(student, students[-1]) for student in students[:-1])
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_follow_up_of_the_authors(exits_of_vectors, vector):
    output, labels = exits_of_vectors
    inputs, expected = vector("eed.followup_BEED")
    depth = torch.arange(1, 5)
    weights = inputs["B"] ** depth / (inputs["B"] ** depth).sum()
    logits, features = torch.stack(output.exit_logits), torch.stack(output.exit_features)
    target = (weights[:, None, None] * logits).sum(dim=0)
    feature_target = (weights[:, None, None] * features).sum(dim=0)
    share = inputs["A"] ** (4 - depth)
    value = add(
        (2 - a) * cross_entropy(z, labels) + a * soften_kl(z, target, 3.0) + 0.1 * mse(f, feature_target)
        for a, z, f in zip(share, logits, features, strict=True)
    )
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_their_method_as_the_follow_up_has_it(exits_of_vectors, vector):
    _, expected = vector("eed.followup_EED_mode_uniform")
    method = get_method("eed", output_loss="kl", output_weight=1.0, feature_weight=0.1)
    assert total(method, *exits_of_vectors).item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_final_exit_is_a_student_and_the_target_detached(exits_of_vectors, vector):
    output, labels = exits_of_vectors
    logits, features = (t[-1].requires_grad_() for t in (output.exit_logits, output.exit_features))
    total(get_method("eed"), output, labels).backward()
    torch.testing.assert_close(logits.grad, vector("eed.grad_deepest_logits")[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(features.grad, vector("eed.grad_deepest_features")[1], atol=1e-5, rtol=0)


def test_the_order_of_exits_does_not_matter(exits_of_vectors):
    output, labels = exits_of_vectors
    turned = MultiExitOutput(exit_logits=output.exit_logits[::-1], exit_features=output.exit_features[::-1])
    method = get_method("eed")
    torch.testing.assert_close(total(method, turned, labels), total(method, output, labels))


def test_a_lone_exit_has_nothing_to_learn_from(exits_of_vectors):
    output, labels = exits_of_vectors
    alone = MultiExitOutput(exit_logits=output.exit_logits[-1:], exit_features=output.exit_features[-1:])
    terms = get_method("eed")(alone, labels, 0.0)
    assert terms["logit"] == terms["feature"] == 0


def test_a_shift_of_all_logits_changes_mse_but_not_kl(exits_of_vectors):
    output, labels = exits_of_vectors
    shift = torch.tensor([[1.0], [-2.0]])
    first, *others = output.exit_logits
    shifted = MultiExitOutput(exit_logits=(first + shift, *others), exit_features=output.exit_features)
    for output_loss, same in (("mse", False), ("kl", True)):
        method = get_method("eed", output_loss=output_loss)
        pair = method(output, labels, 0.0)["logit"], method(shifted, labels, 0.0)["logit"]
        assert torch.allclose(*pair, atol=1e-6) is same


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"output_loss": "l1"}, "EED needs output_loss 'mse' or 'kl', but got output_loss='l1'."),
        ({"output_weight": -1}, "EED needs output_weight >= 0, but got output_weight=-1."),
        ({"feature_weight": -1}, "EED needs feature_weight >= 0, but got feature_weight=-1."),
        ({"temperature": 0}, "EED needs temperature > 0, but got temperature=0."),
    ],
)
def test_values_out_of_range(value, words):
    with pytest.raises(ValueError) as error:
        get_method("eed", **value)
    assert str(error.value) == words
