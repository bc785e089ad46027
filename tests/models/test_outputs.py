"""Outputs as transformers, accelerate and pytrees take them apart and rebuild them."""

import pickle

import pytest
import torch
from accelerate.utils import convert_to_fp32
from PIL import Image
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import pipeline
from transformers.utils import ModelOutput

from hf_selfkd import MultiExitOutput
from hf_selfkd.models.outputs import as_tuples


def output_of(dtype=torch.float32):
    exit_logits = tuple(torch.full((5, 2), float(exit), dtype=dtype) for exit in range(3))
    return MultiExitOutput(logits=exit_logits[-1], exit_logits=exit_logits, scaffold={"seen": torch.zeros(5)})


@pytest.mark.parametrize(
    "rebuild",
    [
        lambda output: MultiExitOutput(dict(output.items())),
        lambda output: pickle.loads(pickle.dumps(output)),
        lambda output: tree_unflatten(*tree_flatten(output)),
        lambda output: convert_to_fp32(output_of(torch.bfloat16)),
    ],
)
def test_outputs_are_rebuilt_with_tuples_over_exits(rebuild):
    output = output_of()
    rebuilt = rebuild(output)
    assert type(rebuilt) is MultiExitOutput and list(rebuilt) == ["logits", "exit_logits", "scaffold"]
    for found in (rebuilt.exit_logits, rebuilt["exit_logits"], rebuilt[1], rebuilt.to_tuple()[1]):
        assert isinstance(found, tuple)
        torch.testing.assert_close(found, output.exit_logits)


def test_items_nest_the_exits():
    nested = dict(output_of().items())["exit_logits"]
    assert type(nested) is ModelOutput and len(nested) == 3
    logits, exit_logits = as_tuples((output_of().logits, nested))
    assert isinstance(logits, torch.Tensor)
    torch.testing.assert_close(exit_logits, output_of().exit_logits)


def test_pipelines_take_batches_of_any_size(build, tmp_path):
    build(id2label={index: str(index) for index in range(5)}).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), top_k=5)
    images = [Image.effect_noise((40, 40), 20 * index + 5).convert("RGB") for index in range(7)]
    expected = [scores_of(classify(image)) for image in images]
    for batch_size in (2, 5, 8):  # there are four exits
        found = [{row["label"]: row["score"] for row in rows} for rows in classify(images, batch_size=batch_size)]
        assert found == expected


def scores_of(row):
    return pytest.approx({prediction["label"]: prediction["score"] for prediction in row}, abs=1e-5)


def test_pipelines_segment_batches_of_any_size(build_segmenter, tmp_path):
    build_segmenter().save_pretrained(tmp_path)
    segment = pipeline("image-segmentation", model=str(tmp_path))
    images = [Image.effect_noise((40, 40), 20 * index + 5).convert("RGB") for index in range(6)]
    for found, expected in zip(segment(images, batch_size=5), map(segment, images), strict=True):
        assert [mask["mask"].tobytes() for mask in found] == [mask["mask"].tobytes() for mask in expected]
