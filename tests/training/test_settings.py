"""Settings are checked before training, and the caller's arguments are never edited."""

import copy
import pickle

import pytest
import torch
from transformers import TrainingArguments

from hf_selfkd import SelfDistillationTrainer, get_method
from hf_selfkd.training.settings import attach_method, check_settings, own_arguments, swapped
from tests.helpers.recipe import PLAIN_SGD


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Trainers make their folder, by default in the current one, even if they then refuse a setting."""
    monkeypatch.chdir(tmp_path)


def entries(args):
    """Return the fields of arguments, with copies of those that could be changed in place."""
    return {
        name: copy.deepcopy(value) if isinstance(value, (dict, list)) else value for name, value in vars(args).items()
    }


def test_the_arguments_of_the_caller_are_not_edited(build, images, tmp_path):
    args = TrainingArguments(
        str(tmp_path),
        **PLAIN_SGD,
        max_steps=2,
        enable_jit_checkpoint=True,
        hub_token="hf_secret",
        eval_strategy="epoch",
    )
    before = entries(args)
    trainer = SelfDistillationTrainer(build(), args, train_dataset=images, eval_dataset=images)
    trainer.train()
    trainer.evaluate()
    assert entries(args) == before
    assert type(args.hub_token) is str
    assert trainer.args is not args


def test_the_trainer_decides_on_a_copy(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, hub_token="hf_secret", enable_jit_checkpoint=True)
    own = own_arguments(args)
    assert (own.ddp_find_unused_parameters, own.ddp_broadcast_buffers) == (False, False)
    assert (own.logging_nan_inf_filter, own.enable_jit_checkpoint) == (False, False)
    assert own.hub_token == "hf_secret"
    assert pickle.loads(pickle.dumps(own)).hub_token is None
    chosen = TrainingArguments(use_cpu=True, ddp_find_unused_parameters=True, ddp_broadcast_buffers=True)
    assert own_arguments(chosen).ddp_find_unused_parameters is own_arguments(chosen).ddp_broadcast_buffers is True


def test_contradictions_are_refused():
    args = TrainingArguments(use_cpu=True)
    check_settings(args, {}, 1, has_milestones=True)
    args.fp16 = True  # which a CPU does not have
    with pytest.raises(ValueError, match="fp16 skips such batches itself"):
        check_settings(args, {}, 1, has_milestones=False)
    check_settings(args, {}, 0, has_milestones=False)
    cosine = TrainingArguments(use_cpu=True, lr_scheduler_type="cosine")
    with pytest.raises(ValueError, match="lr_milestones replace lr_scheduler_type, but both .*='cosine'"):
        check_settings(cosine, {}, 0, has_milestones=True)
    check_settings(cosine, {}, 0, has_milestones=False)


@pytest.mark.parametrize(
    ("name", "smaller_is_better"),
    [("eval_calibration_error", True), ("exit_0_calibration_error", True), ("exit_0_loss", True), ("accuracy", False)],
)
def test_the_rule_for_the_best_model_knows_the_calibration_error(name, smaller_is_better):
    args = own_arguments(TrainingArguments(use_cpu=True, metric_for_best_model=name))
    assert args.greater_is_better is not smaller_is_better


def test_unknown_facts_for_the_card_are_refused_before_training(build, images):
    args = TrainingArguments(use_cpu=True)
    SelfDistillationTrainer(build(), args, train_dataset=images, card={"dataset": "cifar10", "license": "mit"})
    with pytest.raises(TypeError, match="card has the unknown keys datset, licence. It takes model_name, dataset,"):
        SelfDistillationTrainer(build(), args, train_dataset=images, card={"datset": "cifar10", "licence": "mit"})


def test_other_objects_than_methods_are_refused(build):
    with pytest.raises(TypeError, match="method must be a name or a Method"):
        SelfDistillationTrainer(build(), TrainingArguments(use_cpu=True), type(get_method("byot")))


def attach(model, method="byot", *, has_mix=False, **args):
    attach_method(get_method(method), model, TrainingArguments(use_cpu=True, **args), has_mix=has_mix)


def test_models_that_cannot_be_trained_are_refused(build, build_segmenter):
    with pytest.raises(ValueError, match="Expected a multi-exit model, but got Linear"):
        attach(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="BYOT needs at least 2 exits"):
        attach(build(exits=[]))
    frozen = build(exits=[])
    frozen.freeze_backbone()
    with pytest.raises(ValueError, match="No parameter is left to train"):
        attach(frozen, "none")
    changed = build()
    changed.config.problem_type = "regression"
    with pytest.raises(ValueError, match="problem_type must be .*, but got 'regression'"):
        attach(changed)
    for options in ({"has_mix": True}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(ValueError, match="which image-segmentation does not take"):
            attach(build_segmenter(), "none", **options)


def test_a_scaffold_depends_on_the_seed_only(build):
    def scaffold_of(seed):
        model = build()
        torch.rand(seed)  # whatever was drawn before
        attach(model, "frskd", seed=seed)
        return torch.cat([parameter.flatten() for parameter in model.scaffold.parameters()])

    assert torch.equal(scaffold_of(3), scaffold_of(3))
    assert not torch.equal(scaffold_of(3), scaffold_of(4))


def test_an_optimizer_keeps_the_scaffold_whose_parameters_it_holds(build):
    model, method = build(), get_method("frskd")
    method.attach(model)
    scaffold, optimizer = model.scaffold, torch.optim.AdamW(model.parameters())
    attach_method(method, model, TrainingArguments(use_cpu=True), has_mix=False, optimizer=optimizer)
    assert model.scaffold is scaffold
    attach(model, "frskd")
    assert model.scaffold is not scaffold


@pytest.mark.parametrize("attached", [None, "okd_mde", "lsh"])
def test_an_optimizer_that_lacks_parameters_is_refused(build, attached):
    model = build()
    if attached is not None:
        get_method(attached).attach(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"lacks parameters that train: scaffold.*\(\d+ in all\). Call method.attach"):
        SelfDistillationTrainer(model, TrainingArguments(use_cpu=True), "frskd", optimizers=(optimizer, None))


def test_settings_of_what_an_own_optimizer_replaces_are_refused(build):
    model, args = build(), TrainingArguments(use_cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="lr_milestones build a scheduler, but optimizers holds one"):
        SelfDistillationTrainer(model, args, lr_milestones=[1], optimizers=(None, scheduler))
    with pytest.raises(ValueError, match="decay_norms groups the parameters"):
        SelfDistillationTrainer(model, args, decay_norms=True, optimizers=(optimizer, None))


def test_parameters_that_do_not_train_need_no_optimizer(build):
    model, method = build(), get_method("deep_supervision")
    model.freeze_backbone()
    optimizer = torch.optim.AdamW(model.exits.parameters())
    attach_method(method, model, TrainingArguments(use_cpu=True), has_mix=False, optimizer=optimizer)
    model.backbone.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks parameters that train: backbone\."):
        attach_method(method, model, TrainingArguments(use_cpu=True), has_mix=False, optimizer=optimizer)


def test_the_method_is_attached_inside_what_wraps_the_model(build):
    model = build()
    attach(torch.nn.Sequential(model), "frskd")
    assert model.scaffold is not None
    assert model.detach_exits
    assert "frskd" in model.model_tags


def test_attributes_return_after_an_error():
    module = torch.nn.Linear(1, 1)
    with pytest.raises(KeyError), swapped(module, training=False, bias=None):
        assert (module.training, module.bias) == (False, None)
        raise KeyError
    assert module.training
    assert module.bias.shape == (1,)
