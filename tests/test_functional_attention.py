import pytest
import torch
from torch.testing import assert_close

from hf_selfkd.functional import attention_loss, attention_map


def test_attention_maps_of_the_vectors(vector):
    inputs, expected = vector("frskd.attention_map")
    assert_close(attention_map(inputs["student_maps"][0]), expected["student"], atol=1e-5, rtol=0)
    assert_close(attention_map(inputs["teacher_maps"][0]), expected["teacher"], atol=1e-5, rtol=0)


def test_attention_loss_of_the_vectors(vector):
    inputs, expected = vector("frskd.at_loss_levels")
    losses = [attention_loss(*maps) for maps in zip(inputs["student_maps"], inputs["teacher_maps"], strict=True)]
    assert_close(torch.stack(losses), expected, atol=1e-5, rtol=0)


def test_norm_form_of_the_paper_by_composition(vector):
    inputs, expected = vector("frskd.at_paper_norm_form")
    norms = [
        (attention_map(student) - attention_map(teacher)).norm(dim=1).mean()
        for student, teacher in zip(inputs["student_maps"], inputs["teacher_maps"], strict=True)
    ]
    assert_close(torch.stack(norms), expected, atol=1e-5, rtol=0)


def test_attention_map_is_a_unit_vector_that_ignores_scale_and_sign():
    level = torch.randn(3, 5, 4, 6)
    attention = attention_map(level)
    assert attention.shape == (3, 24)
    assert_close(attention.norm(dim=1), torch.ones(3))
    assert_close(attention_map(-7 * level), attention)


def test_attention_map_is_float32_for_maps_whose_squares_overflow_float16():
    level = torch.full((1, 2, 2, 2), 6e4, dtype=torch.float16)
    assert_close(attention_map(level), torch.full((1, 4), 0.5))


def test_zero_map_gives_zeros_and_a_finite_gradient():
    level = torch.zeros(2, 3, 4, 4, requires_grad=True)
    assert_close(attention_map(level), torch.zeros(2, 16))
    attention_loss(level, torch.rand(2, 3, 4, 4)).backward()
    assert_close(level.grad, torch.zeros_like(level))


@pytest.mark.parametrize("student_channels", [1, 8])
def test_one_pixel_gives_no_attention_loss(student_channels):
    loss = attention_loss(torch.randn(4, student_channels, 1, 1), torch.randn(4, 3, 1, 1))
    assert_close(loss, torch.zeros(()))


def test_attention_loss_teaches_the_student_alone_and_does_not_depend_on_the_batch_size():
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    teacher = torch.randn(2, 6, 4, 4, requires_grad=True)
    loss = attention_loss(student, teacher)
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert_close(attention_loss(student.repeat(3, 1, 1, 1), teacher.repeat(3, 1, 1, 1)), loss)
    assert attention_loss(student, 2 * student) < 1e-12
