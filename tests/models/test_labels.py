import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hf_selfkd.models.labels import class_labels, label_maps, label_sets

NAME = "Sample 1 of the training data"
INTEGERS = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


def maps(labels, size=(8, 8), **options):
    return label_maps(labels, size, 5, 11, NAME, **options)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_all_integers_become_int64(dtype):
    expected = torch.tensor([3, 0, 4])
    array = expected.numpy().astype(dtype)
    for labels in (array, torch.from_numpy(array), array.tolist()):
        converted = class_labels(labels, 5, NAME)
        assert converted.dtype == torch.int64
        assert_close(converted, expected)
    pixels = np.full((1, 8, 8), 3, dtype=dtype)
    pixels[0, 0] = 11
    converted = maps(pixels)
    assert converted.dtype == torch.int64
    assert converted[0, :2, 0].tolist() == [-100, 3]


@pytest.mark.parametrize(
    "label",
    [
        3,
        -100,
        True,
        np.int64(4),
        np.array(4),
        torch.tensor(2),
        [0.2] * 5,
        torch.full((5,), 0.2),
        [0.0] * 5,
        (0, 0, 1.0, 0, 0),
    ],
)
def test_a_label_of_a_sample(label):
    converted = class_labels([label], 5, NAME)
    assert_close(converted[0], torch.as_tensor(label), check_dtype=False)
    assert converted.dtype == (torch.float32 if converted.dim() == 2 else torch.int64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_of_any_precision(dtype):
    labels = torch.rand(16, 1000).softmax(dim=1).to(dtype)
    assert_close(class_labels(labels, 1000, NAME), labels.float())


@pytest.mark.parametrize(
    "label",
    [
        *("cat", None, 1.0, torch.tensor(1.0), [1, 0, 0, 0, 0], [0.5, 0.5], torch.zeros(5, dtype=torch.long), {}),
        torch.zeros(8, 8, dtype=torch.long),
    ],
)
def test_labels_of_another_kind_are_refused(label):
    words = (
        "has the label .*, but a label is a class index .* or 5 probabilities .*Use -100 .*multi_label_classification"
    )
    with pytest.raises(ValueError, match=f"^{NAME} {words}"):
        class_labels([label], 5, NAME)


@pytest.mark.parametrize(
    "label", [[1.0, 1, 0, 0, 0], [-1.0] * 5, [1.5, -0.5, 0, 0, 0], [0.5, 0, 0, 0, 0], [float("nan")] * 5]
)
def test_floats_that_are_no_probabilities_are_refused(label):
    """Several ones are the labels of a multi-label model; the loss of rows of -1 was negative."""
    shown = re.escape(str([float(value) for value in label]))
    words = rf"^{NAME} has the label {shown}, but probabilities are at least 0 and sum to 1, or are all 0"
    with pytest.raises(ValueError, match=f'{words} .*problem_type="multi_label_classification"'):
        class_labels([[0.2] * 5, label], 5, NAME)


@pytest.mark.parametrize("label", [5, -1, 255])
def test_classes_out_of_range_are_refused(label):
    words = rf"^{NAME} has label {label}, but the model has 5 classes \(0 to 4\).*no label, use -100"
    with pytest.raises(ValueError, match=words):
        class_labels([0, label, -100], 5, NAME)


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 1, 8, 8)])
def test_maps_have_one_channel_or_none(shape):
    labels = torch.arange(128).reshape(shape) % 5
    for given in (labels, labels.numpy(), labels.tolist(), labels.float()):
        assert_close(maps(given), labels.reshape(2, 8, 8))


def test_ignored_pixels_become_minus_100():
    labels = torch.tensor([[[0, 11], [-100, 4]]], dtype=torch.int16)
    assert_close(maps(labels, (2, 2)), torch.tensor([[[0, -100], [-100, 4]]]))


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (3, "has the label 3, but a label is a map of class indices, .* Mark pixels without a class with 11"),
        (torch.zeros(3, 8, 8), r"has the label of shape \(3, 8, 8\), but a label is a map"),
        (torch.zeros(4, 8), r"has a label map of \(4, 8\) pixels, but an image of \(8, 8\)"),
        (torch.full((8, 8), 7), "has a pixel of class 7, but the model has 5 classes .* and ignores 11"),
        (torch.full((8, 8), 0.5), "has a pixel of class 0.5, but the model has 5 classes .* and ignores 11"),
    ],
)
def test_maps_that_do_not_fit_are_refused(label, words):
    with pytest.raises(ValueError, match=f"^{NAME} {words}"):
        maps([label])


def test_values_are_not_read_where_that_would_wait():
    assert class_labels(torch.tensor([7]), 5, NAME, check_values=False).tolist() == [7]
    assert maps(torch.full((1, 8, 8), 7), check_values=False).unique().tolist() == [7]
    with pytest.raises(ValueError, match="has the label"):
        class_labels(torch.zeros(2, 3), 5, NAME, check_values=False)


# Label sets


def test_label_sets_of_any_type():
    expected = torch.tensor([[1.0, 0.0, torch.nan]])
    for labels in ([[1, 0, -100]], torch.tensor([[1, 0, -100]]), np.array([[1.0, 0.0, np.nan]])):
        assert_close(label_sets(labels, 3, NAME), expected, equal_nan=True)
    assert_close(label_sets([np.array([True, False, True])], 3, NAME), torch.tensor([[1.0, 0.0, 1.0]]))
    assert_close(label_sets(torch.tensor([[7.0, 0.5, 0.0]]), 3, NAME, check_values=False)[0, 0], torch.tensor(7.0))


@pytest.mark.parametrize("labels", [[3], [[1, 0]], ["cat"], [[[1, 0, 1]]], torch.zeros(3, 2)])
def test_what_is_no_label_set_is_refused(labels):
    with pytest.raises(ValueError, match=f"^{NAME} has the label .* a vector of 3 values, one for every class"):
        label_sets(labels, 3, NAME)


@pytest.mark.parametrize("wrong", [2, -1, 1.5])
def test_values_that_are_no_probabilities_are_refused(wrong):
    with pytest.raises(ValueError, match=f"^{NAME} has {wrong} in its label, but"):
        label_sets([[1, wrong, 0]], 3, NAME)
