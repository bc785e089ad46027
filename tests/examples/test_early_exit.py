"""The example that calibrates early exit."""

import json

import early_exit
import torch
from transformers import AutoModelForImageClassification

from hf_selfkd import EarlyExitOutput, ExitPolicy


def test_a_checkpoint_gets_an_exit_policy(hub, build, images, tmp_path, capsys):
    folder = tmp_path / "model"
    model = build(num_labels=10)
    model.config.pretrained_cfg |= {"input_size": [3, 32, 32]}
    model.save_pretrained(folder)
    options = ["--dataset", "digits", "--max_eval_samples", "120", "--target_cost", "0.7"]
    options += ["--push_to_hub", "--hub_private_repo", "--hub_revision", "early"]
    early_exit.main(["--checkpoint", str(folder), *options])
    result = json.loads((folder / "early_exit.json").read_text())
    assert len(result["exits"]) == 4 and result["policy"]["calibration"]["demand"] == {"target_cost": 0.7}
    assert (folder / "early_exit.png").stat().st_size > 1000
    assert "| exit | cost | share | accuracy | calibration error |" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert f"{100 * result['accuracy']:.2f}% at {result['cost']:.3f} of the full cost" in card
    assert "0.7 of the full cost" in card and "(early_exit.png)" in card
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert ExitPolicy.from_dict(loaded.config.exit_policy).num_exits == 4
    assert isinstance(loaded(images[0]["pixel_values"][None]), EarlyExitOutput)
    assert (folder / "modeling_classification.py").exists()  # the checkpoint is still complete
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    assert hub.repositories["ada/model"].private
    files = hub.repositories["ada/model"].files("early")
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()} | {
        ".gitattributes": files[".gitattributes"]
    }


def test_the_options_of_the_data_are_those_of_training():
    options = early_exit.parse(
        ["--checkpoint", "x", "--target_cost", "0.5", "--dataset", "folder", "--eval_share", "0.2"]
        + ["--image_column", "photo", "--label_column", "kind", "--evaluation_split", "dev"]
    )
    assert (options.dataset, options.eval_share, options.evaluation_split) == ("folder", 0.2, "dev")
    assert (options.image_column, options.label_column, options.target_cost) == ("photo", "kind", 0.5)


def test_a_slow_policy_and_few_images_give_warnings():
    labels = torch.arange(400) % 2
    right = torch.nn.functional.one_hot(labels, 2).float()
    speed = {"images_per_second": 90.0, "plain_images_per_second": 100.0, "realised_speedup": 0.9}
    assert early_exit.warnings_of(speed | {"realised_speedup": 1.1}, right[None], labels) == []
    (slow,) = early_exit.warnings_of(speed, right[None], labels)
    assert "90 images/s, vs. 100 of the backbone" in slow
    half = right.clone()
    half[:200] = half[:200].flip(1)
    (small,) = early_exit.warnings_of(speed | {"realised_speedup": 1.1}, half[None], labels)
    assert "400 images" in small and "2.5 points" in small
