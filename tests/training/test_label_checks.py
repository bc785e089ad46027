"""Where labels are looked for, and the name that a refused one has; what is refused is in tests/test_tasks.py."""

import pytest
import torch

from tests.helpers.runs import check_of

check = check_of(5, "training")


@pytest.mark.parametrize("name", ["labels", "label"])
def test_both_names_of_the_stock_collator_are_checked(name):
    check(0, {name: 4})
    with pytest.raises(ValueError, match="^Sample 7 of the training data has label 5, .* 5 classes"):
        check(7, {name: 5})


def test_a_sample_without_a_label():
    check(0, {"pixel_values": torch.zeros(3, 4, 4)})


def test_the_task_decides():
    image, labels = torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8)
    labels[0] = 11
    maps = check_of(5, "test", "image-segmentation", semantic_loss_ignore_index=11)
    maps(0, {"pixel_values": image, "labels": labels})
    with pytest.raises(ValueError, match="^Sample 0 of the training data has the label"):
        check(0, {"pixel_values": image, "labels": labels})
    labels[0, 0] = 7
    with pytest.raises(ValueError, match="^Sample 2 of the test data has a pixel of class 7"):
        maps(2, {"pixel_values": image, "labels": labels})
