import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hf_selfkd.functional import cross_entropy, resize_logits, sigmoid_ramp, soften_kl


def test_pixel_cross_entropy_of_the_vectors(vector):
    inputs, expected = vector("frskd.seg_ce")
    labels = inputs["mask"].masked_fill(inputs["mask"] == inputs["ignore_index"], -100)
    for name in ("student", "teacher"):
        assert_close(cross_entropy(inputs[f"{name}_pixel_logits"], labels), expected[name], atol=1e-5, rtol=0)


def test_pixel_divergence_of_the_vectors(vector):
    inputs, expected = vector("frskd.seg_kl")
    logits = inputs["student_pixel_logits"], inputs["teacher_pixel_logits"]
    labelled = inputs["mask"] != inputs["ignore_index"]
    assert_close(soften_kl(*logits, 1.0), expected["T1"], atol=1e-5, rtol=0)
    assert_close(soften_kl(*logits, 2.0), expected["T2"], atol=1e-5, rtol=0)
    assert_close(soften_kl(*logits, 1.0, labelled), expected["T1_void_masked"], atol=1e-5, rtol=0)


def test_ramp_of_the_vectors(vector):
    inputs, expected = vector("frskd.seg_ramp")
    epochs = inputs["epochs"].tolist()[1:]
    values = [sigmoid_ramp((epoch + 1 - 40) / 20) for epoch in epochs]
    assert_close(torch.tensor(values), expected[1:], atol=1e-5, rtol=0)
    assert sigmoid_ramp(1) == sigmoid_ramp(3) == 1


def test_images_weigh_the_same_whatever_their_number_of_labelled_pixels():
    logits, labels = torch.randn(3, 4, 5, 6), torch.randint(0, 4, (3, 5, 6))
    labels[0, 1:] = -100
    labels[1] = -100
    expected = torch.zeros(())
    for index in (0, 2):
        known = labels[index] != -100
        chosen = logits[index].permute(1, 2, 0)[known]
        expected += F.cross_entropy(chosen, labels[index][known]) / 3
    assert_close(cross_entropy(logits, labels), expected)
    # So micro-batches and processes add up to the same loss.
    parts = [cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(3)]
    assert_close(torch.stack(parts).mean(), expected)


def test_masked_divergence_is_a_mean_over_labelled_pixels_then_images():
    student, teacher = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    mask = torch.tensor([[[True, False], [False, False]], [[False, False], [False, False]]])
    expected = soften_kl(student[:1, :, 0, 0], teacher[:1, :, 0, 0], 2.0) / 2
    assert_close(soften_kl(student, teacher, 2.0, mask), expected)


def test_logits_are_interpolated_to_the_size_of_the_labels():
    logits, labels = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 9, 13))
    resized = F.interpolate(logits, size=(9, 13), mode="bilinear", align_corners=False)
    assert_close(resize_logits(logits, (9, 13)), resized)
    assert resize_logits(logits, (5, 6)) is logits
    assert_close(cross_entropy(logits, labels), cross_entropy(resized, labels))


def test_label_maps_must_have_the_batch_of_the_logits():
    with pytest.raises(ValueError, match=r"indices shaped \(2, 4, 4\)"):
        cross_entropy(torch.zeros(2, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))
