import math

import pytest
import torch
import torch.nn.functional as F

from hf_selfkd.functional import (
    add,
    cross_entropy,
    label_loss,
    mse,
    smooth_labels,
    soften_kl,
    weighted_cross_entropy,
)


def softmax(row):
    exponentials = [math.exp(value) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def test_cross_entropy_of_every_exit_of_the_vectors(exits_of_vectors, vector):
    output, labels = exits_of_vectors
    _, expected = vector("common.ce_per_exit")
    losses = torch.stack([cross_entropy(logits, labels) for logits in output.exit_logits])
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)


def test_cross_entropy_of_probabilities_equals_that_of_the_same_labels():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(
        cross_entropy(logits, F.one_hot(labels, 4).float()), cross_entropy(logits, labels), rtol=1e-6, atol=1e-6
    )


def test_cross_entropy_counts_labelled_samples_only():
    logits = torch.randn(4, 3)
    labels = torch.tensor([2, -100, 0, -100])
    expected = -(math.log(softmax(logits[0].tolist())[2]) + math.log(softmax(logits[2].tolist())[0])) / 2
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    probabilities = torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    assert cross_entropy(logits, probabilities).item() == pytest.approx(expected, rel=1e-5)


def test_class_weights_are_those_of_torch_but_for_the_divisor():
    logits, labels, weights = torch.randn(6, 4), torch.tensor([0, 1, -100, 3, 1, 0]), torch.tensor([1.0, 0, 5, 2])
    expected = F.cross_entropy(logits, labels, weights, reduction="sum") / 5
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, weights), expected)
    hard = labels.where(labels != -100, 2)
    soft = F.one_hot(hard, 4).float()
    by_torch = F.cross_entropy(logits, soft, weights)  # of probabilities torch's mean is over samples
    torch.testing.assert_close(weighted_cross_entropy(logits, soft, weights), by_torch)
    torch.testing.assert_close(weighted_cross_entropy(logits, hard, weights), by_torch)


def test_the_weight_of_a_pixel_is_that_of_its_class():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    labels[0, 0] = -100
    weights = torch.tensor([1.0, 2.0, 0.0])
    pixels = F.cross_entropy(logits, labels, weights, reduction="none")
    expected = (pixels[0].sum() / 12 + pixels[1].sum() / 16) / 2
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, weights), expected)


def test_another_label_loss_replaces_that_of_every_exit():
    exits, labels = [torch.randn(6, 4), torch.randn(6, 4)], torch.tensor([0, 1, 2, 3, 1, 0])
    seen = []

    def loss(logits, labels):
        seen.append((logits, labels))
        return logits.mean()

    with label_loss(loss) as losses:
        torch.testing.assert_close(cross_entropy(exits, labels), exits[0].mean() + exits[1].mean())
        assert [logits is exit for (logits, _), exit in zip(seen, exits, strict=True)] == [True, True]
        assert all(given is labels for _, given in seen)
    torch.testing.assert_close(torch.stack(losses), torch.stack([exit.mean() for exit in exits]))
    with label_loss(None) as losses:
        torch.testing.assert_close(cross_entropy(exits, labels), sum(F.cross_entropy(exit, labels) for exit in exits))
    assert losses == []


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4, 6)])
def test_cross_entropy_without_any_label_is_zero_with_a_finite_gradient(shape):
    logits = torch.randn(shape, requires_grad=True)
    loss = cross_entropy(logits, torch.full(shape[:1] + shape[2:], -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(shape))


def test_cross_entropy_refuses_labels_of_another_shape():
    with pytest.raises(
        ValueError, match=r"indices shaped \(2,\) or class probabilities shaped \(2, 3\), but got .*\(3,\)"
    ):
        cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="torch.float32 labels"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize(("name", "scale"), [("byot.kl_to_deepest", 1 / 9), ("byot.kl_to_deepest_T2", 1)])
def test_soften_kl_of_the_vectors(exits_of_vectors, vector, name, scale):
    output, _ = exits_of_vectors
    _, expected = vector(name)
    *early, final = output.exit_logits
    divergences = torch.stack([scale * soften_kl(logits, final, 3.0) for logits in early])
    torch.testing.assert_close(divergences, expected, atol=1e-5, rtol=0)


def test_soften_kl_against_the_definition():
    student, teacher = torch.randn(2, 3), torch.randn(2, 3)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p_s, p_t = softmax([v / 2 for v in s]), softmax([v / 2 for v in t])
        expected += 4 * sum(b * math.log(b / a) for a, b in zip(p_s, p_t, strict=True)) / 2
    assert soften_kl(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_soften_kl_over_pixels_is_a_mean_over_pixels():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    rows = [tensor.permute(0, 2, 3, 1).reshape(-1, 3) for tensor in (student, teacher)]
    torch.testing.assert_close(soften_kl(student, teacher, 2.0), soften_kl(*rows, 2.0))


def test_soften_kl_is_zero_at_agreement_and_detaches_the_teacher():
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    assert soften_kl(teacher, teacher, 4.0).item() == pytest.approx(0, abs=1e-6)
    soften_kl(student, teacher, 4.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_divergence_and_soft_cross_entropy_have_the_same_gradient(exits_of_vectors, vector):
    output, _ = exits_of_vectors
    _, expected = vector("byot.soft_xent_to_deepest")
    *early, final = output.exit_logits
    for logits, value in zip(early, expected, strict=True):
        logits = logits.clone().requires_grad_()
        soft = cross_entropy(logits / 3, (final / 3).softmax(dim=1))
        assert soft.item() == pytest.approx(value.item(), abs=1e-5)
        (soft_gradient,) = torch.autograd.grad(9 * soft, logits)
        (gradient,) = torch.autograd.grad(soften_kl(logits, final, 3.0), logits)
        torch.testing.assert_close(gradient, soft_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_logits_are_float32(dtype):
    logits = torch.tensor([[60.0, -60.0], [0.0, 0.0]], dtype=dtype)
    labels = torch.tensor([1, 0])
    assert cross_entropy(logits, labels).item() == pytest.approx((120 + math.log(2)) / 2, rel=1e-6)
    assert soften_kl(logits, logits.flip(1), 1.0).isfinite()
    assert cross_entropy(logits, labels).dtype == mse(logits, logits).dtype == torch.float32


def test_smooth_labels():
    smoothed = smooth_labels(torch.tensor([1, -100]), 4, 0.2)
    torch.testing.assert_close(smoothed, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0, 0, 0, 0]]))
    logits = torch.randn(3, 4)
    labels = torch.tensor([0, 3, 1])
    torch.testing.assert_close(
        cross_entropy(logits, smooth_labels(labels, 4, 0.1)), F.cross_entropy(logits, labels, label_smoothing=0.1)
    )
    torch.testing.assert_close(smooth_labels(F.one_hot(labels, 4).float(), 4, 0.1), smooth_labels(labels, 4, 0.1))


def test_add_is_a_tensor_also_for_no_terms():
    assert torch.equal(add([]), torch.zeros(()))
    assert add([torch.tensor(1.0), torch.tensor(2.0)]).item() == 3


def test_several_logits_are_added_up_for_labels_of_every_kind():
    several = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    teacher = torch.randn(4, 3)
    labels = torch.tensor([0, 2, -100, 1])
    for targets in (labels, smooth_labels(labels, 3, 0.1)):
        expected = sum(cross_entropy(logits, targets) for logits in several)
        torch.testing.assert_close(cross_entropy(several, targets), expected)
    expected = sum(soften_kl(logits, teacher, 3.0) for logits in several)
    torch.testing.assert_close(soften_kl(several, teacher, 3.0), expected)
    dense = [torch.randn(2, 3, size, size) for size in (2, 4)]  # interpolated each on its own
    maps = torch.tensor([0, 2, -100, 1]).repeat(2, 4, 1)
    expected = sum(cross_entropy(logits, maps) for logits in dense)
    torch.testing.assert_close(cross_entropy(dense, maps), expected)
    assert cross_entropy([], labels).item() == 0
    with pytest.raises(ValueError, match=r"labels must be class indices shaped \(5,\)"):
        cross_entropy([several[0], torch.randn(5, 3)], labels)
