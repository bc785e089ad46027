"""Labels that a model can learn from, and those that are refused."""

import numpy as np
import pytest
import torch

from hf_selfkd.training.label_checks import LabelCheck

check = LabelCheck(num_labels=5, name="training", ignore_index=11)


@pytest.mark.parametrize("label", [3, -100, np.int64(4), torch.tensor(2), True, [0.2] * 5, torch.full((5,), 0.2)])
def test_labels_of_the_right_type(label):
    check(0, {"labels": label})
    check(0, {"label": label})


def test_a_sample_without_a_label():
    check(0, {"pixel_values": torch.zeros(3, 4, 4)})


@pytest.mark.parametrize(
    "label", ["cat", None, 1.0, torch.tensor(1.0), [1, 0, 0, 0, 0], [0.5, 0.5], torch.zeros(5, dtype=torch.long), {}]
)
def test_labels_of_the_wrong_type(label):
    words = r"^Sample 1 of the training data has the label .*, but a label is a class index, a map of them, or 5 proba"
    with pytest.raises(ValueError, match=words):
        check(1, {"labels": label})


@pytest.mark.parametrize("label", [5, -1, np.int64(5), torch.tensor(5)])
def test_a_class_outside_the_model(label):
    with pytest.raises(ValueError, match=rf"Sample 7 of the training data has label {int(label)}, .* 5 classes"):
        check(7, {"labels": label})


def test_label_maps():
    image, labels = torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8)
    labels[0] = 11
    check(0, {"pixel_values": image, "labels": labels})
    check(0, {"pixel_values": image, "labels": labels.long().masked_fill(labels == 11, -100).numpy()})
    with pytest.raises(ValueError, match=r"Sample 3 .* a label map of \(2, 2\) pixels, but an image of \(4, 4\)"):
        check(3, {"pixel_values": image, "labels": labels[::2, ::2]})
    labels[0, 0] = 7
    with pytest.raises(ValueError, match=r"Sample 2 .* pixel of class 7, .* 5 classes \(0 to 4\) and ignores 11"):
        check(2, {"pixel_values": image, "labels": labels})
