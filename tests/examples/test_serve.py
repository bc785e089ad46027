"""The runner without torch: same preprocessing as timm, same exits as the model."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, export_early_exit
from tests.helpers.models import build_copy

SERVE = Path(__file__).parents[2] / "examples" / "serve"


@pytest.fixture(scope="module")
def runner():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SERVE)
        import early_exit_model

        yield early_exit_model


@pytest.fixture(scope="module")
def photographs():
    draw = np.random.default_rng(0)
    sizes = [(40, 60), (60, 40), (33, 33), (200, 90), (32, 45)]
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("input_size", [(3, 32, 32), (3, 24, 32), (1, 32, 32)])
def test_preprocessing_is_that_of_timm(runner, photographs, input_size, crop_mode):
    data = {"mean": [0.4] * input_size[0], "std": [0.2] * input_size[0], "interpolation": "bicubic", "crop_pct": 0.9}
    transform = timm.data.create_transform(input_size=input_size, crop_mode=crop_mode, **data)
    model = runner.EarlyExitModel.__new__(runner.EarlyExitModel)
    model.read_preprocessing({"input_size": input_size, "crop_mode": crop_mode} | data)
    for photograph in photographs:
        expected = transform(photograph.convert("L") if input_size[0] == 1 else photograph)
        np.testing.assert_allclose(model.preprocess(photograph), expected.numpy(), atol=1e-5)


@pytest.mark.slow
def test_files_are_classified_as_by_the_model_without_torch(photographs, tmp_path):
    model = build_copy(MultiExitForImageClassification, "test_resnet").eval()
    model.config.pretrained_cfg |= {"input_size": [3, 32, 32], "crop_pct": 0.9}
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, photograph in enumerate(photographs):
        photograph.save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.config.pretrained_cfg))
    images = torch.stack([transform(photograph) for photograph in photographs])
    with torch.no_grad():
        scores = model(images).exit_logits[0].softmax(dim=1).amax(dim=1).sort().values
    policy = ExitPolicy(thresholds=[scores[2:4].mean().item(), 0.0, 0.0])
    export_early_exit(model, tmp_path / "exits.onnx", policy)
    expected = model.early_exit(images, policy)
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['timm'] = None  # importing them fails\n"
        f"sys.argv = sys.argv[1:]; runpy.run_path({str(SERVE / 'classify.py')!r}, None, '__main__')"
    )
    command = [sys.executable, "-c", code, "classify.py", tmp_path / "exits.onnx", folder, "--batch_size", "3"]
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, env={"PYTHONPATH": str(SERVE)}
    ).stdout.splitlines()
    assert sum("broken.jpg: left out" in line for line in printed) == 1
    found = [re.search(r"(\d).png: (\w+) ([\d.]+) % at exit (\d)", line) for line in printed]
    found = [match for match in found if match]
    assert [int(match[4]) for match in found] == expected.exit_index.tolist()
    labels = [model.config.id2label[index] for index in expected.logits.argmax(dim=1).tolist()]
    assert [match[2] for match in found] == labels
    assert "5 images" in printed[-1]
