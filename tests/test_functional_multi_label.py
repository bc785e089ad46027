import math

import pytest
import torch
import torch.nn.functional as F

from hf_selfkd.functional import binary_kl, disagreement, soften_kl


def plain_binary_kl(student, teacher, temperature):
    """Return the mean divergence between the outcomes of every class, number by number."""

    def sigmoid(value):
        return 1 / (1 + math.exp(-value / temperature))

    total = 0.0
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        for q, p in ((sigmoid(s), sigmoid(t)) for s, t in zip(student_row, teacher_row, strict=True)):
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return temperature**2 * total / student.numel()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_binary_divergence(temperature):
    student, teacher = 3 * torch.randn(4, 5), 3 * torch.randn(4, 5)
    expected = plain_binary_kl(student, teacher, temperature)
    assert binary_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    both = binary_kl([student, teacher], teacher, temperature)
    assert both.item() == pytest.approx(expected, rel=1e-5)  # agreement adds 0


def test_a_class_is_a_softmax_over_its_two_outcomes():
    student, teacher = torch.randn(6, 1), torch.randn(6, 1)
    outcomes = [torch.cat([logits, torch.zeros_like(logits)], dim=1) for logits in (student, teacher)]
    torch.testing.assert_close(binary_kl(student, teacher, 2.0), soften_kl(*outcomes, 2.0))


def test_gradient_is_that_of_soft_labels_and_the_teacher_gets_none():
    student, teacher = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
    binary_kl(student, teacher, 2.0).backward()
    assert teacher.grad is None
    soft = 4 * F.binary_cross_entropy_with_logits(student / 2, (teacher / 2).sigmoid().detach())
    torch.testing.assert_close(student.grad, torch.autograd.grad(soft, student)[0])


def test_saturated_and_half_precision_logits_stay_finite():
    logits = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16, requires_grad=True)
    loss = binary_kl(logits, -logits, 1.0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_disagreement_of_sigmoid_outputs():
    saturated = 100 * torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    assert disagreement([saturated, -saturated], multi_label=True).item() == pytest.approx(2)  # sqrt of 4 classes
