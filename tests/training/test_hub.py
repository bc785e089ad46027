"""To the stand-in for the Hub and back, with the real client over HTTP."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    TrainingArguments,
    pipeline,
)

import hf_selfkd
from hf_selfkd import ExitPolicy, SelfDistillationTrainer
from tests.helpers.layering import MODELS, shipped_modules
from tests.helpers.runs import same_weights

MODULES = {f"{name}.py" for name in shipped_modules()}
NEEDED = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


def tags(files):
    return ModelCard(files["README.md"].decode()).data.tags


def assert_holds(files, model):
    """Check that files are those that loading a model needs: its weights bit by bit and this package's code."""
    assert files.keys() >= NEEDED
    weights, state = load(files["model.safetensors"]), model.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items())
    code = {name for name in files if name.endswith(".py")}
    assert code <= MODULES
    assert {"modeling_classification.py", "configuration.py"} & code
    for name in code:
        assert files[name] == (MODELS / name).read_bytes(), name


def test_a_pushed_model_holds_all_that_loading_needs(hub, build):
    model = build(exit_policy=ExitPolicy(thresholds=[0.5] * 3).to_dict(), early_exit=True).eval()
    model.push_to_hub("model", private=True)
    assert hub.repositories["ada/model"].private
    assert_holds(hub.repositories["ada/model"].files(), model)
    assert {"hf_selfkd", "timm", "image-classification"} <= set(tags(hub.repositories["ada/model"].files()))
    hub.requests.clear()
    loaded = AutoModelForImageClassification.from_pretrained("ada/model")
    assert type(loaded) is hf_selfkd.MultiExitForImageClassification
    assert same_weights(loaded, model)
    assert loaded.config.exit_policy == model.config.exit_policy
    fetched = {request.rsplit("/", 1)[1] for request in hub.requests if request.startswith("GET /ada/model/resolve/")}
    assert fetched == {"config.json", "model.safetensors"}


def test_processor_and_pipeline_from_a_repository(hub, build):
    model = build().eval()
    model.push_to_hub("model")
    image = Image.effect_noise((50, 40), 100).convert("RGB")
    processor = AutoImageProcessor.from_pretrained("ada/model")
    assert type(processor).__name__ == "TimmWrapperImageProcessor"
    probabilities = model(processor(image)["pixel_values"]).logits.softmax(dim=1)[0]
    predictions = pipeline("image-classification", model="ada/model")(image, top_k=5)
    for found in predictions:
        expected = probabilities[model.config.label2id[found["label"]]].item()
        assert found["score"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_saving_with_push_to_hub_uploads_all_that_it_wrote(hub, build, build_segmenter, tmp_path, task):
    model = (build if task == "classification" else build_segmenter)().eval()
    folder = tmp_path / "my-model"
    model.save_pretrained(folder, push_to_hub=True, private=True)
    files = hub.repositories["ada/my-model"].files()
    assert_holds(files, model)
    assert files["preprocessor_config.json"] == (folder / "preprocessor_config.json").read_bytes()
    (folder / "README.md").write_text("---\ntags: [mine]\n---\nMy card.\n")
    (folder / "notes.txt").write_text("not of this call")
    model.save_pretrained(folder, push_to_hub=True, repo_id="ada/other", commit_message="Once more")
    files = hub.repositories["ada/other"].files()
    assert_holds(files, model)
    assert tags(files) == ["mine"]
    assert "notes.txt" not in files
    assert hub.repositories["ada/other"].messages[-1] == "Once more"


@pytest.mark.slow
def test_a_segmentation_model_from_a_repository(hub, build_segmenter):
    model = build_segmenter().eval()
    model.push_to_hub("maps")
    assert {"hf_selfkd", "timm", "image-segmentation"} <= set(tags(hub.repositories["ada/maps"].files()))
    loaded = AutoModelForSemanticSegmentation.from_pretrained("ada/maps")
    assert same_weights(loaded, model)
    image = Image.effect_noise((50, 40), 100).convert("RGB")
    predictions = pipeline("image-segmentation", model="ada/maps")(image)
    assert {found["mask"].size for found in predictions} == {(50, 40)}


def test_tags_do_not_spread_to_other_models(hub, build):
    build().push_to_hub("first", tags=["first"])
    build().push_to_hub("second")
    assert "first" in tags(hub.repositories["ada/first"].files())
    assert "first" not in tags(hub.repositories["ada/second"].files())


# The trainer

PUSHING = {"push_to_hub": True, "hub_model_id": "ada/run", "hub_token": "hf_of_ada", "hub_private_repo": True}


def test_the_trainer_pushes_while_it_trains_and_at_the_end(hub, build, train, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "hub_strategy": "checkpoint"}
    trainer = train(build(), "eed+lsh", hub_always_push=True, **PUSHING, **saving)
    repository = hub.repositories["ada/run"]
    assert repository.private
    running = repository.files()
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= running.keys()
    assert "modeling_classification.py" in running
    assert {"last-checkpoint/model.safetensors", "last-checkpoint/scaffold.safetensors"} <= running.keys()
    (Path(trainer.args.output_dir) / "curve.png").write_bytes(b"a plot")
    policy = ExitPolicy(thresholds=[0.5] * 3).to_dict()
    trainer.model.config.exit_policy, trainer.model.config.early_exit = policy, True
    trainer.push_to_hub()
    files = repository.files()
    top = {name: content for name, content in files.items() if "/" not in name}
    trainer.model.scaffold = None
    assert_holds(top, trainer.model)
    assert files["curve.png"] == b"a plot"
    assert json.loads(files["config.json"])["exit_policy"] == policy
    assert {"hf_selfkd", "timm", "image-classification", "eed", "lsh"} <= set(tags(files))
    assert not [name for name, content in files.items() if b"hf_of_ada" in content]
    assert torch.load(tmp_path / "run" / "training_args.bin", weights_only=False).hub_token is None


def test_the_trainer_pushes_to_a_branch(hub, build, train):
    trainer = train(build(), **PUSHING, hub_revision="try-1")
    trainer.push_to_hub()
    trainer.push_to_hub(revision="try-2")
    repository = hub.repositories["ada/run"]
    assert "model.safetensors" not in repository.files()
    for branch in ("try-1", "try-2", repository.branches["try-1"]):
        loaded = AutoModelForImageClassification.from_pretrained("ada/run", revision=branch)
        assert torch.equal(loaded.exits[0].classifier.weight, trainer.model.exits[0].classifier.weight)
    with pytest.raises(OSError, match="try-3 is not a valid git identifier"):
        AutoModelForImageClassification.from_pretrained("ada/run", revision="try-3")


def test_a_model_is_pushed_to_a_branch(hub, build):
    model = build()
    model.push_to_hub("model", revision="small")
    assert "model.safetensors" in hub.repositories["ada/model"].files("small")
    assert "model.safetensors" not in hub.repositories["ada/model"].files()


# What goes wrong


@pytest.mark.slow
def test_a_broken_upload_leaves_a_saved_model_and_can_be_repeated(hub, build, train, tmp_path):
    trainer = train(build())
    hub.breaks = "PUT /storage/"
    with pytest.raises(RuntimeError, match="Error while uploading"):
        trainer.push_to_hub()
    assert hub.repositories["ada/run"].files().keys() == {".gitattributes"}
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert same_weights(loaded, trainer.model)
    hub.breaks = "POST /api/models/ada/run/commit"
    with pytest.raises(Exception, match="Server disconnected"):  # of the HTTP client, as it is
        trainer.push_to_hub()
    hub.breaks, hub.requests[:] = None, []
    trainer.push_to_hub()
    assert_holds(hub.repositories["ada/run"].files(), trainer.model)
    assert not [request for request in hub.requests if request.startswith("PUT")]  # it had arrived the time before


def test_nothing_is_lost_where_the_repository_cannot_be_made(hub, build, train, tmp_path):
    model = build()
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="bob/model")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "mine").config.num_labels == 5
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        model.push_to_hub("bob/model")
    trainer = train(model, hub_model_id="bob/model")
    with pytest.raises(OSError, match="403 Forbidden"):
        trainer.push_to_hub()
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "run").config.num_labels == 5


def test_failed_uploads_of_checkpoints_are_reported_once_and_made_up_for(hub, build, images, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    args = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 5}
    args = TrainingArguments(str(tmp_path / "run"), **PUSHING, **saving, **args, hub_always_push=True)
    trainer = SelfDistillationTrainer(build(), args, train_dataset=images)
    hub.breaks = "PUT /storage/"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught if "Could not upload" in str(warning.message)]
    assert len(messages) == 2
    assert messages[0].startswith("Could not upload a checkpoint to ada/run: RuntimeError: Error while uploading '")
    hub.breaks = None
    trainer.push_to_hub()
    assert_holds(hub.repositories["ada/run"].files(), trainer.model)


def test_a_private_repository_is_for_its_owner(hub, build, monkeypatch):
    build().push_to_hub("secret", private=True)
    load = AutoModelForImageClassification.from_pretrained
    for token in ("hf_of_bob", False):
        with pytest.raises(OSError, match="If this is a private repository"):
            load("ada/secret", token=token)
    with pytest.raises(OSError, match="Invalid credentials|unauthorized|couldn't connect|401"):
        load("ada/secret", token="hf_invalid")
    assert load("ada/secret", token="hf_of_ada").num_exits == 4
    monkeypatch.setenv("HF_TOKEN", "hf_of_bob")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden|404"):
        build().push_to_hub("ada/secret")


def test_a_card_that_the_hub_refuses_is_named(hub, build, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\ntags: 7\n---\n")
    with pytest.raises(ValueError, match='"tags" must be an array'):
        build().save_pretrained(tmp_path / "model", push_to_hub=True)
