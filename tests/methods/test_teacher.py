import copy
import pickle

import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_selfkd import MultiExitOutput
from hf_selfkd.methods.teacher import Teacher

TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TINY_VIT |= {"image_size": 32, "patch_size": 8, "num_labels": 5}


def resnet(**kwargs):
    return timm.create_model("test_resnet", num_classes=5, **kwargs)


def distilled():
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    return timm.create_model("deit_tiny_distilled_patch16_224", **kwargs)


def hf_resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    return ResNetForImageClassification(config)


def conv_classifier():
    network = timm.create_model("resnetv2_50", num_classes=5, layers=(1, 1, 1, 1), channels=(8, 8, 8, 16))
    assert isinstance(network.get_classifier(), torch.nn.Conv2d)
    return network


@pytest.mark.parametrize(
    ("create", "width"),
    [
        (resnet, 96),
        (conv_classifier, 16),
        (hf_resnet, 16),
        (lambda: ViTForImageClassification(ViTConfig(**TINY_VIT)), 16),
    ],
)
def test_returns_the_logits_of_the_network_and_the_inputs_of_its_classifier(build, batch, create, width):
    network = create().train()
    teacher = Teacher(network, build(), with_features=True)
    predicted = teacher.predict(batch["pixel_values"])
    logits = network(batch["pixel_values"])
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    assert torch.equal(predicted["teacher_logits"], logits)
    assert predicted["teacher_features"].shape == (8, width) and teacher.num_features == width
    weight, bias = list(network.parameters())[-2:]
    torch.testing.assert_close(predicted["teacher_features"] @ weight.flatten(1).T + bias, logits)


def test_the_final_exit_of_a_multi_exit_model_teaches(build, batch):
    network = build(exit_width=24, ensemble=True).eval()
    predicted = Teacher(network, build(), with_features=True).predict(batch["pixel_values"])
    output = network(batch["pixel_values"])
    assert torch.equal(predicted["teacher_logits"], output.exit_logits[-1])
    assert torch.equal(predicted["teacher_features"], output.exit_features[-1])
    assert not torch.equal(predicted["teacher_logits"], output.logits)


def test_is_frozen_and_in_eval_mode_also_in_training(build, batch):
    model, network = build(), resnet()
    model.scaffold = Teacher(network, model)
    assert model.scaffold.network is network
    model.train()
    assert not any(module.training for module in network.modules())
    before = copy.deepcopy(network.state_dict())
    output = model(batch["pixel_values"])
    assert not output.scaffold["teacher_logits"].requires_grad
    output.logits.sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_is_not_saved(build, tmp_path):
    model = build()
    keys = model.state_dict().keys()
    model.scaffold = torch.nn.ModuleDict({"kept": torch.nn.Linear(2, 2), "teacher": Teacher(resnet(), model)})
    assert set(model.scaffold.state_dict()) == {"kept.weight", "kept.bias"}
    assert set(model.state_dict()) - keys == {"scaffold.kept.weight", "scaffold.kept.bias"}
    assert Teacher(resnet(), model).state_dict() == {}


def test_works_in_the_precision_of_the_run(build, batch):
    model = build()
    teacher = Teacher(resnet(), model, with_features=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher.predict(batch["pixel_values"])["teacher_logits"].dtype == torch.bfloat16
    assert teacher.predict(batch["pixel_values"].bfloat16())["teacher_logits"].dtype == torch.float32


def test_copies_and_pickles_and_hooks_each_network_once(build, batch):
    model, network = build(), resnet()
    first, second = (Teacher(network, model, with_features=True) for _ in range(2))
    assert len(network.get_classifier()._forward_pre_hooks) == 1
    expected = first.predict(batch["pixel_values"])["teacher_features"]
    for teacher in (second, copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
        assert torch.equal(teacher.predict(batch["pixel_values"])["teacher_features"], expected)


def test_loads_folders_of_every_kind(build, batch, tmp_path):
    model = build()
    multi_exit, vit = build("test_vit"), ViTForImageClassification(ViTConfig(**TINY_VIT))
    multi_exit.save_pretrained(tmp_path / "multi_exit")
    vit.save_pretrained(tmp_path / "vit")
    teacher = Teacher(str(tmp_path / "multi_exit"), model)
    expected = multi_exit.eval()(batch["pixel_values"]).logits
    torch.testing.assert_close(teacher.predict(batch["pixel_values"])["teacher_logits"], expected)
    teacher = Teacher(str(tmp_path / "vit"), model)
    expected = vit.eval()(batch["pixel_values"]).logits
    torch.testing.assert_close(teacher.predict(batch["pixel_values"])["teacher_logits"], expected)
    network = resnet()
    save_for_hf(network, tmp_path / "timm")
    expected = network.eval()(batch["pixel_values"])
    teacher = Teacher(str(tmp_path / "timm"), model, with_features=True)
    torch.testing.assert_close(teacher.predict(batch["pixel_values"])["teacher_logits"], expected)
    assert teacher.num_features == 96


def test_timms_wrapper_is_unwrapped(build):
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=5)
    network = TimmWrapperForImageClassification(config)
    teacher = Teacher(network, build(), with_features=True)
    assert teacher.network is network.timm_model and teacher.num_features == 96


def test_a_timm_name_brings_its_weights(build, monkeypatch):
    asked, network, model = [], resnet(), build()
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: asked.append((args, kwargs)) or network)
    assert Teacher("resnet50.a1_in1k", model).network is network
    assert asked == [(("resnet50.a1_in1k",), {"pretrained": True})]


def test_errors_say_what_to_do(build):
    model = build()
    with pytest.raises(ValueError, match="'resnet5' is neither a folder, a Hub repository .* Did you mean 'resnet50'"):
        Teacher("resnet5", model)
    with pytest.raises(TypeError, match="teacher must be a timm model, .* or the name of one, but got Linear"):
        Teacher(torch.nn.Linear(2, 5), model)
    with pytest.raises(ValueError, match="The teacher has 7 classes, but the model has 5. Choose a teacher"):
        Teacher(timm.create_model("test_resnet", num_classes=7), model)
    with pytest.raises(ValueError, match="shares weights with the model in training. Pass a copy"):
        Teacher(model.backbone, model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    teacher = Teacher(resnet(), model)
    images, maps = torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, 8, 8)
    with pytest.raises(ValueError, match=r"shaped \(1, 5\), the model logits shaped \(1, 5, 8, 8\). Teachers are"):
        teacher(images, MultiExitOutput(logits=maps))


@pytest.mark.parametrize("create", [distilled, lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**TINY_VIT))])
def test_two_classifiers_have_logits_but_no_one_feature(build, batch, create):
    network = create()
    predicted = Teacher(network, build()).predict(batch["pixel_values"])
    assert predicted.keys() == {"teacher_logits"} and predicted["teacher_logits"].shape == (8, 5)
    with pytest.raises(ValueError, match="has 2 of them. Choose a teacher with one linear classifier"):
        Teacher(network, build(), with_features=True)
