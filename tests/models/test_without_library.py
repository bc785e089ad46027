"""Repositories as people load them who never heard of this library."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from hf_selfkd import ExitPolicy
from tests.helpers.layering import MODELS, shipped_modules

SCRIPT = Path(__file__).parents[1] / "helpers" / "load_without_library.py"


@pytest.mark.slow
def test_a_trained_checkpoint_works_where_only_torch_timm_and_transformers_are(
    hub, build, build_segmenter, train, images, tmp_path
):
    trainer = train(build(), "frskd", hub_model_id="ada/run")
    model = trainer.model.eval()
    first = torch.stack([image["pixel_values"] for image in images])
    with torch.no_grad():
        confidences = model(first).exit_logits[0].softmax(dim=1).amax(dim=1)
    policy = ExitPolicy(thresholds=[confidences.median().item(), 2.0, 2.0])
    model.config.exit_policy, model.config.early_exit = policy.to_dict(), True
    trainer.push_to_hub()
    maps = build_segmenter().eval()
    maps.push_to_hub("maps")

    torch.save(first, tmp_path / "images.pt")
    photo = Image.effect_noise((50, 40), 100).convert("RGB")
    photo.save(tmp_path / "photo.png")
    environment = hub.environment(tmp_path / "home")
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(SCRIPT), "ada/run", "ada/maps", str(tmp_path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    results = torch.load(tmp_path / "results.pt", weights_only=False)

    assert len(results["refusals"]) == 2
    assert all(
        "contains custom code" in refusal and "`trust_remote_code=True`" in refusal for refusal in results["refusals"]
    )
    assert results["ran_before_trust"] == []
    assert results["module"].startswith("transformers_modules.")
    model.scaffold = None
    state = model.state_dict()
    assert results["weights"].keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in results["weights"].items())
    with torch.no_grad():
        early, full = model(first), model(first, output_hidden_states=True)
    for logits, expected in zip(results["exit_logits"], full.exit_logits, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)  # memory-mapped weights are unaligned
    torch.testing.assert_close(results["features"], full.exit_features[-1], atol=1e-5, rtol=1e-5)
    assert torch.equal(results["exit_index"], early.exit_index)
    assert set(early.exit_index.tolist()) == {0, 3}
    torch.testing.assert_close(results["early_logits"], early.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(results["pixel_values"], AutoImageProcessor.from_pretrained("ada/run")(photo)["pixel_values"])
    for prediction, expected in zip(
        results["predictions"], pipeline("image-classification", model="ada/run")(photo, top_k=5), strict=True
    ):
        assert prediction == {"label": expected["label"], "score": pytest.approx(expected["score"], abs=1e-5)}
    assert len(results["batch"]) == 6 and all(row == results["batch"][0] for row in results["batch"])
    for name in shipped_modules() - {"modeling_segmentation", "pyramid", "labels"}:
        assert (tmp_path / "copy" / f"{name}.py").read_bytes() == (MODELS / f"{name}.py").read_bytes()

    with torch.no_grad():
        torch.testing.assert_close(results["maps"], maps(first).logits, atol=1e-5, rtol=1e-5)
    masks = pipeline("image-segmentation", model="ada/maps")(photo)
    assert results["batch_of_masks"] == 6 * [len(results["masks"])]
    assert results["masks"].keys() == {mask["label"] for mask in masks}
