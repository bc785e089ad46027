import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.helpers.versions import checkpoint_activations

# With what it takes to run on 32-pixel images; every kind of stage output: maps, NHWC maps, tokens with and without
# prefix, and trunks that read a grid, a relative position or a convolutional stem.
BACKBONES = {
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_nfnet": {},
    "test_byobnet": {},
    "test_mambaout": {},
    "test_vit": {"backbone_kwargs": {"img_size": 32, "patch_size": 8}},
    "test_vit_relpos": {"backbone_kwargs": {"img_size": 32, "patch_size": 8}},
    "swin_tiny_patch4_window7_224": {
        "backbone_kwargs": {
            "embed_dim": 16,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 4, 8),
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
        }
    },
    "densenet121": {"backbone_kwargs": {"growth_rate": 4, "block_config": (1, 1, 1, 1)}},
    "deit_tiny_distilled_patch16_224": {
        "backbone_kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4}
    },
    "eva02_tiny_patch14_224": {"backbone_kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4}},
    "xcit_nano_12_p8_224": {"backbone_kwargs": {"img_size": 32, "embed_dim": 16, "depth": 4}},
    "levit_128s": {},
}


@pytest.fixture(params=BACKBONES)
def model(request, build):
    return build(request.param, **BACKBONES[request.param])


def inputs_of(model):
    size = 224 if model.config.backbone == "levit_128s" else 32
    return torch.randn(3, 3, size, size)


def test_with_the_models_weights_a_copy_is_the_model(model):
    tail = model.copy_tail().eval()
    state = model.backbone.state_dict()
    tail.load_state_dict({f"backbone.{name}": state[name] for name in tail.backbone.state_dict()})
    with torch.no_grad():
        output = model.eval()(inputs_of(model), output_hidden_states=True)
        logits, features = tail(output.stage_outputs[tail.stage])
    assert torch.equal(logits, output.logits)
    assert torch.equal(features, output.exit_features[-1])


@pytest.mark.slow
def test_a_copy_is_initialised_anew_and_shares_nothing(model):
    before = copy.deepcopy(model.state_dict())
    first, second = model.copy_tail(), model.copy_tail()
    own = dict(model.backbone.named_parameters())
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    for name, parameter in first.backbone.named_parameters():
        assert parameter.data_ptr() not in pointers and parameter.requires_grad
        if own[name].dim() > 1 and own[name].std() > 0:
            assert not torch.equal(parameter, own[name])
            assert not torch.equal(parameter, second.backbone.get_parameter(name))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_copy_holds_what_it_computes_and_trains_all_of_it(model):
    tail = model.copy_tail()
    output = model.train()(inputs_of(model))
    logits, features = tail(output.stage_outputs[tail.stage])
    (logits.sum() + features.sum()).backward()
    assert [name for name, parameter in tail.named_parameters() if parameter.grad is None] == []
    total = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert 0 < sum(parameter.numel() for parameter in tail.parameters()) < total


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_a_copy_trains_the_trunk_and_nothing_behind_it(build, backbone):
    model = build(backbone, **BACKBONES[backbone], exits=[]).train()
    tail = model.copy_tail()
    output = model(inputs_of(model))
    tail(output.stage_outputs[tail.stage])[0].sum().backward()
    untouched = {name for name, parameter in model.backbone.named_parameters() if parameter.grad is None}
    assert untouched == {name for name, _ in tail.backbone.named_parameters()}


@pytest.mark.parametrize(
    ("backbone", "stage", "after"),
    [
        ("test_resnet", 3, ["fc", "layer4"]),
        ("test_resnet", 4, ["fc"]),
        ("test_resnet", 0, ["fc", "layer1", "layer2", "layer3", "layer4"]),
        ("test_vit", 3, ["blocks.4", "blocks.5", "fc_norm", "head", "norm"]),
        ("test_efficientnet", 3, ["blocks.4", "bn2", "classifier", "conv_head"]),
        ("test_convnext", 2, ["head", "stages.3"]),
    ],
)
def test_layers_after_a_stage(build, backbone, stage, after):
    model = build(backbone, **BACKBONES[backbone])
    names = [name for name, _ in model.copy_tail(stage).backbone.named_parameters()]
    expected = [name for name, _ in model.backbone.named_parameters() if name.startswith(tuple(after))]
    assert names == expected


@pytest.mark.parametrize(("backbone", "stage"), [("test_resnet", 3), ("test_vit", 3), ("test_convnext", 2)])
def test_the_default_stage_is_that_of_the_last_default_exit(build, backbone, stage):
    model = build(backbone, **BACKBONES[backbone], exits=[0])
    assert model.copy_tail().stage == stage


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_a_copy_survives_deepcopy_and_pickle(build, backbone):
    model = build(backbone, **BACKBONES[backbone]).eval()
    tail = model.copy_tail().eval()
    output = model(inputs_of(model), output_hidden_states=True).stage_outputs[tail.stage]
    for again in (copy.deepcopy(tail), pickle.loads(pickle.dumps(tail))):
        assert torch.equal(again(output)[0], tail(output)[0])


def test_a_copy_leaves_what_it_reads_alone(build):
    model = build("test_resnet").eval()
    tail = model.copy_tail()
    output = model(inputs_of(model), output_hidden_states=True).stage_outputs[tail.stage]
    output = output - 1
    before, version = output.clone(), output._version
    tail.backbone.layer4[0].conv1 = nn.Sequential(nn.ReLU(inplace=True), tail.backbone.layer4[0].conv1)
    tail(output)
    assert torch.equal(output, before) and output._version == version


def test_a_copy_takes_other_batch_and_image_sizes(build):
    model = build("test_resnet").eval()
    tail = model.copy_tail()
    for shape in [(1, 3, 64, 64), (7, 3, 40, 56)]:
        output = model(torch.randn(shape), output_hidden_states=True).stage_outputs[tail.stage]
        logits, features = tail.eval()(output)
        assert logits.shape == (shape[0], 5) and features.shape == (shape[0], model.anatomy.width)


def test_a_copy_of_a_frozen_checkpointed_backbone_trains_without_checkpointing(build):
    model = build("test_resnet")
    checkpoint_activations(model)
    model.freeze_backbone()
    tail = model.copy_tail()
    assert all(parameter.requires_grad for parameter in tail.parameters()) and tail.backbone.layer4.training
    assert not tail.backbone.grad_checkpointing and model.backbone.grad_checkpointing


def test_the_projection_to_another_width_is_copied(build):
    tail = build("test_resnet", exit_width=12).copy_tail()
    assert [module.weight.shape for module in tail.classifiers] == [(5, 12)]
    assert tail.backbone.fc[0].weight.shape == (12, 96)


def test_a_copy_under_autocast(build):
    model = build("test_vit", **BACKBONES["test_vit"])
    tail = model.copy_tail()
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(inputs_of(model))
        logits, _ = tail(output.stage_outputs[tail.stage])
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_a_network_that_goes_around_the_stage_is_refused(build):
    model = build("test_resnet")
    model.backbone.layer4[0].register_forward_pre_hook(lambda module, args: (args[0] + model.backbone.seen.mean(),))
    model.backbone.conv1.register_forward_hook(lambda module, args, output: setattr(model.backbone, "seen", output))
    with pytest.raises(ValueError, match="after stage 3 of this ResNet cannot be copied: the network is not seq"):
        model.copy_tail(3)


@pytest.mark.slow
def test_a_family_that_is_not_sequential_is_refused(build):
    with pytest.raises(ValueError, match="cannot be copied: the network is not sequential there. Choose another"):
        build("legacy_xception").copy_tail()


def test_a_stage_that_hooks_do_not_see_is_refused(build):
    model = build("test_resnet")
    model.anatomy = replace(
        model.anatomy, stages=(*model.anatomy.stages[:-1], replace(model.anatomy.stages[-1], module=None))
    )
    with pytest.raises(ValueError, match="after stage 3 of this ResNet cannot be copied: the network is not seq"):
        model.copy_tail()


def test_there_is_no_such_stage(build):
    with pytest.raises(ValueError, match="The backbone has stages 0 to 4, but copy_tail was asked for 5"):
        build("test_resnet").copy_tail(5)
