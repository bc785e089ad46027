"""Learning rates per part and per layer, and the groups that timm's own optimizers read."""

import pytest
import timm.optim
import torch
from transformers import TrainingArguments

from hf_selfkd import SelfDistillationTrainer
from hf_selfkd.training.learning_rates import learning_rates
from tests.helpers.runs import losses


def rates_by_name(trainer):
    """Return the learning rate and the weight decay of every parameter that the trainer's optimizer has."""
    names = {parameter: name for name, parameter in trainer.network.named_parameters()}
    groups = trainer.optimizer.param_groups
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def trainer_of(model, tmp_path, images, method="frskd", **kwargs):
    args = TrainingArguments(tmp_path, learning_rate=0.1, weight_decay=0.05)
    trainer = SelfDistillationTrainer(model, args, method, train_dataset=images, **kwargs)
    trainer.create_optimizer()
    return trainer


def test_layers_and_exits_have_their_learning_rates(build, tmp_path, images):
    model = build("test_vit")  # six blocks
    trainer = trainer_of(model, tmp_path, images, exit_learning_rate=0.3, layer_decay=0.5)
    rates = rates_by_name(trainer)
    assert rates.keys() == {name for name, _ in trainer.network.named_parameters()}
    num_blocks = len(model.backbone.blocks)
    assert rates["backbone.pos_embed"] == (pytest.approx(0.1 * 0.5 ** (num_blocks + 1)), 0.0)
    for block in range(num_blocks):
        expected = pytest.approx(0.1 * 0.5 ** (num_blocks - block))
        assert rates[f"backbone.blocks.{block}.attn.qkv.weight"] == (expected, 0.05)
        assert rates[f"backbone.blocks.{block}.norm1.weight"] == (expected, 0.0)
    assert rates["exits.0.mlp.0.weight"] == rates["backbone.head.weight"] == (0.3, 0.05)
    assert rates["scaffold.classifier.weight"] == (0.1, 0.05)


def test_the_exits_alone_learn_faster(build, tmp_path, images):
    rates = rates_by_name(trainer_of(build(), tmp_path, images, exit_learning_rate=0.3))
    assert rates["backbone.conv1.0.weight"][0] == rates["scaffold.classifier.weight"][0] == 0.1
    assert rates["exits.2.classifier.bias"][0] == rates["backbone.fc.bias"][0] == 0.3


def test_a_pyramid_is_a_head(build_segmenter, tmp_path, images):
    model = build_segmenter()
    rates = learning_rates(model, 0.1, 0.3, 0.5)
    named = dict(model.named_parameters())
    assert rates[named["backbone.layer4.0.conv1.weight"]] == pytest.approx(0.05)
    assert {rates[named[name]] for name in named if not name.startswith("backbone.")} == {0.3}


def test_the_groups_of_the_stock_trainer_stay_where_nothing_is_set(build, tmp_path, images):
    found = trainer_of(build("test_vit"), tmp_path, images).optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in found] == [(0.1, 0.05), (0.1, 0.0)]


def test_equal_learning_rates_train_as_one(build, train):
    plain = train(build("test_vit"), "byot", max_steps=2)
    grouped = train(
        build("test_vit"), "byot", max_steps=2, trainer_kwargs={"layer_decay": 1.0, "exit_learning_rate": 0.01}
    )
    assert losses(grouped) == losses(plain)


def test_warm_up_and_schedule_apply_to_every_group(build, train):
    options = {"layer_decay": 0.5, "exit_learning_rate": 0.04, "lr_milestones": [0.5], "lr_gamma": 0.1}
    trainer = train(build("test_vit"), "byot", max_steps=2, num_train_epochs=1, trainer_kwargs=options)
    groups = trainer.optimizer.param_groups
    assert {round(group["lr"] / group["initial_lr"], 6) for group in groups} == {0.1}
    assert max(group["initial_lr"] for group in groups) == 0.04


def test_timms_own_groups_are_those_of_the_backbone(build):
    model = build("test_vit")
    ours = timm.optim.param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    plain = model.backbone
    theirs = timm.optim.param_groups_layer_decay(plain, layer_decay=0.5, no_weight_decay_list=plain.no_weight_decay())

    def settings(groups):
        return {p: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    found = settings(ours)
    assert settings(theirs).items() <= found.items()
    assert {found[parameter][0] for parameter in model.exits.parameters()} == {1.0}
    assert model.no_weight_decay() == {f"backbone.{name}" for name in plain.no_weight_decay()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_learning_rate": 0.0}, "exit_learning_rate must be above 0, but got 0.0"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], but got 1.5"),
        ({"layer_decay": 0.5, "optimizers": True}, "optimizers or optimizer_cls_and_kwargs was passed"),
    ],
)
def test_what_has_no_effect_is_refused(build, tmp_path, images, options, message):
    model = build()
    if "optimizers" in options:
        options = options | {"optimizers": (torch.optim.SGD(model.parameters()), None)}
    with pytest.raises(ValueError, match=message):
        trainer_of(model, tmp_path, images, **options)
