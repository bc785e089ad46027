"""The example that calibrates early exit."""

import json

import early_exit
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
