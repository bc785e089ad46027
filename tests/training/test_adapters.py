"""Adapters of the real PEFT: trained, saved, resumed and loaded with every method."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_selfkd import MultiExitForImageClassification, SelfDistillationTrainer, get_method, list_methods
from hf_selfkd.methods.base import multi_exit_model
from tests.helpers.runs import losses

peft = pytest.importorskip("peft")

HEADS = ["exits.0", "exits.1", "exits.2"]
SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def adapted(model, *, heads=True, **options):
    """Put LoRA on the attention of a ViT or the convolutions of a ResNet, and train the heads."""
    is_vit = hasattr(model.backbone, "blocks")
    options = {"target_modules": ["qkv"] if is_vit else r".*layer\d.*conv\d"} | options
    if heads:
        options["modules_to_save"] = [*HEADS, "head" if is_vit else "fc"]
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options))


def method_of(name):
    return get_method(name, teacher=timm.create_model("test_resnet", num_classes=5)) if name == "kd" else name


def logits_of(model, batch):
    with torch.no_grad():
        return torch.stack(model.eval()(batch["pixel_values"]).exit_logits)


@pytest.mark.parametrize("name", list_methods())
def test_every_method_trains_the_adapter_and_the_heads(build, batch, name):
    model = adapted(build("test_vit"))
    method = method_of(name)
    method = get_method(method) if isinstance(method, str) else method
    method.attach(model, num_images=len(batch["labels"]))
    output = replace(model.train()(batch["pixel_values"]), sample_indices=torch.arange(len(batch["labels"])))
    sum(method.terms(output, batch["labels"], 1.0).values()).backward()
    network = multi_exit_model(model)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lora_B" in key for key in trained) and any("modules_to_save" in key for key in trained)
    scaffold = network.scaffold
    if scaffold is not None and next(scaffold.parameters(), None) is not None and name != "kd":
        assert any(".scaffold." in key for key in trained)


def test_detached_exits_give_the_adapter_no_gradient(build, batch):
    model = adapted(build("test_vit"))
    get_method("none").attach(model)
    sum(logits.sum() for logits in model.train()(batch["pixel_values"]).exit_logits[:-1]).backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" in name)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "exits.0.modules" in name)


@pytest.mark.parametrize(("backbone", "name"), [("test_vit", "frskd"), ("test_resnet", "okd_mde")])
def test_an_adapter_is_saved_resumed_and_loaded(build, batch, train, tmp_path, backbone, name):
    trainer = train(adapted(build(backbone)), name, **SAVING)
    expected = logits_of(trainer.model, batch)
    assert not torch.equal(expected, logits_of(build(backbone), batch))
    trainer.save_model(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(build(backbone), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, batch), expected)
    resumed = train(adapted(build(backbone)), name, resume=str(tmp_path / "run" / "checkpoint-1"), **SAVING)
    assert losses(resumed) == losses(trainer)
    assert torch.equal(logits_of(resumed.model, batch), expected)


def test_the_scaffold_is_not_in_the_adapter(build, train, tmp_path):
    trainer = train(adapted(build("test_vit"), bias="all"), "frskd", max_steps=1)
    trainer.save_model(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(name.endswith("proj.bias") for name in names)
    assert not any("scaffold" in name for name in names)


@pytest.mark.slow
def test_the_card_is_one_of_an_adapter(build, train, tmp_path):
    trainer = train(adapted(build("test_vit")), "byot", max_steps=1)
    for _ in range(2):  # PEFT adds to a card that is there
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*README")
            trainer.save_model(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert 'PeftModel.from_pretrained(base, "adapter")' in card
    assert "pipeline(" not in card


@pytest.mark.slow
def test_a_merged_model_is_saved_as_any_other(build, batch, train, tmp_path):
    trainer = train(adapted(build("test_vit")), "frskd", max_steps=1)
    expected = logits_of(trainer.model, batch)
    with pytest.raises(ValueError, match="adapter from the PEFT model, or merge it first"):
        trainer.network.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    trainer.model.merge_and_unload().save_pretrained(tmp_path)
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded, batch), expected)


def test_heads_that_the_adapter_leaves_out_are_named(build, train):
    with pytest.warns(UserWarning, match=r"modules_to_save=\['exits.0', 'exits.1', 'exits.2', 'head'\]"):
        train(adapted(build("test_vit"), heads=False), "byot", max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter")
        train(adapted(build("test_vit")), "byot", max_steps=1)


@pytest.mark.slow
def test_an_adapter_in_a_compiled_model_is_saved_as_an_adapter(build, images, tmp_path):
    model = torch.compile(adapted(build("test_vit")), backend="eager")
    trainer = SelfDistillationTrainer(model, TrainingArguments(tmp_path / "run"), "none", train_dataset=images)
    assert {"pixel_values", "labels"} <= next(iter(trainer.get_train_dataloader())).keys()
    trainer.save_model(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("lora_A" in name for name in names)
    assert not any("_orig_mod" in name for name in names)


def test_the_documented_adapter_runs(build, images, tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "training.md"
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments("run", max_steps=1, report_to=[], use_cpu=True)
    for snippet in re.findall(r"```py\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(snippet, {"model": build("test_vit"), "args": args, "data": images})
    assert load_file("merged/model.safetensors").keys() == load_file("base/model.safetensors").keys()
