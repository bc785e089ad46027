import pytest
import torch

from hf_selfkd.models.stages import Stage, choose_stages


def test_tokens_that_do_not_form_a_grid():
    stage = Stage("", 8, (4, 4), (64, 64), layout="NLC", num_prefix_tokens=1)
    assert stage.to_feature_map(torch.zeros(2, 1 + 2 * 6, 8), (32, 96)).shape == (2, 8, 2, 6)
    with pytest.raises(
        ValueError, match=r"returned 11 tokens for images of 32x96 pixels, which do not form a grid of 2x6\. U"
    ):
        stage.to_feature_map(torch.zeros(2, 12, 8), (32, 96))


def stages(*sides):
    return [Stage(None, 8, (side, side), (64, 64)) for side in sides]


@pytest.mark.parametrize(
    ("sides", "without_last", "with_last"),
    [
        ((32, 16, 8, 4, 2), [1, 2, 3], [1, 2, 3, 4]),  # ResNet
        ((16, 8, 4, 2), [0, 1, 2], [0, 1, 2, 3]),  # ConvNeXt, Swin
        ((32, 16, 16, 8, 8), [0, 2], [0, 2, 4]),  # the last of each resolution
        ((112, 56, 28, 14, 14, 7), [1, 2, 4], [1, 2, 4, 5]),  # MobileNet
        ((8, 4), [0], [0, 1]),
        ((14,) * 12, [2, 5, 8], [2, 5, 8, 11]),  # ViT
        ((14,) * 6, [1, 2, 3], [1, 2, 3, 5]),
        ((14,) * 2, [0], [0, 1]),
        ((14,), [], [0]),
    ],
)
def test_stages_are_chosen_by_resolution_or_depth(sides, without_last, with_last):
    assert choose_stages(stages(*sides), include_last=False) == without_last
    assert choose_stages(stages(*sides), include_last=True) == with_last
