import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from hf_selfkd import get_method
from hf_selfkd.functional import mse, soften_kl
from hf_selfkd.methods.averaged_teacher import AveragedTeacher
from tests.helpers.runs import losses, same_weights


def attached(method, model):
    method.attach(model)
    return model.train()


def other_weights(module):
    """Change the weights, as a training would."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


class Weights(TrainerCallback):
    """Keeps the weights before the run and after each step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.seen.append(self.inference(model))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen.append(self.inference(model))

    @staticmethod
    def inference(model):
        state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("scaffold.")}
        return {name: tensor.double() for name, tensor in state.items() if tensor.is_floating_point()}


def test_it_follows_every_step_of_the_optimizer(build, train):
    """Not every micro-batch: five steps of 4 images here, of two micro-batches each."""
    weights = Weights()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5}
    method = get_method("kd", teacher="ema", teacher_decay=0.75)
    trainer = train(build(), method, trainer_kwargs={"callbacks": [weights]}, **settings)
    first, *after = weights.seen
    assert len(after) == 5
    expected = first
    for state in after:
        expected = {name: 0.75 * tensor + 0.25 * state[name] for name, tensor in expected.items()}
    average = trainer.scaffold.average.module
    assert any(name.endswith("running_var") for name in expected)
    for name, tensor in Weights.inference(average).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("teacher", ["ema", "ema_ensemble"])
def test_kd_learns_from_it(build, batch, teacher):
    method = get_method("kd", teacher=teacher)
    model = attached(method, build())
    other_weights(model.scaffold)
    model.scaffold.average.module.config.exit_policy = None
    output = model(batch["pixel_values"])
    average = copy.deepcopy(model.scaffold.average.module)
    assert not average.training
    averaged = average(batch["pixel_values"])
    target = averaged.logits if teacher == "ema" else averaged.ensemble_logits
    terms = method.terms(output, batch["labels"], 0.0)
    torch.testing.assert_close(terms["logit"], 0.9 * soften_kl(output.exit_logits, target, 4.0))
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("scaffold."), name


def test_byot_and_lsh_learn_from_its_final_exit(build, batch):
    model = build()
    byot, lsh = get_method("byot", teacher="ema"), get_method("lsh", teacher="ema", num_hashes=8, correct_only=False)
    output = attached(byot, model)(batch["pixel_values"])
    averaged = model.scaffold.average.module(batch["pixel_values"])
    terms = byot.terms(output, batch["labels"], 0.0)
    logit = soften_kl(output.exit_logits[:-1], averaged.logits, 3.0)
    torch.testing.assert_close(terms["logit"], 0.3 * logit)
    hint = sum(mse(features, averaged.exit_features[-1]) for features in output.exit_features[:-1])
    torch.testing.assert_close(terms["hint"], 0.03 * hint)
    output = attached(lsh, model)(batch["pixel_values"])
    target = output.scaffold["teacher_features"]
    torch.testing.assert_close(target, model.scaffold.teacher.average.module(batch["pixel_values"]).exit_features[-1])
    errors = sum(mse(features, target) for features in output.exit_features[:-1])
    assert len(output.scaffold["student_projections"]) == 3 and not model.detach_exits
    torch.testing.assert_close(lsh.terms(output, batch["labels"], 0.0)["feature"], 6 * errors)
    assert "exits" not in lsh.terms(output, batch["labels"], 0.0)


def test_a_policy_does_not_make_it_exit_early(build, batch):
    model = build()
    policy = {"criterion": "confidence", "thresholds": [0.0, 0.0, 0.0], "temperatures": [1.0] * 4}
    model.config.exit_policy, model.config.early_exit = policy, True
    model = attached(get_method("kd", teacher="ema"), model)
    output = model(batch["pixel_values"])
    assert model.config.early_exit and output.scaffold["teacher_logits"].shape == output.logits.shape


@pytest.mark.parametrize("name", ["byot+lsh", pytest.param("kd", marks=pytest.mark.slow)])
def test_a_run_resumes_bit_for_bit(build, train, tmp_path, name):
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    own = {"teacher": "ema", "teacher_decay": 0.5}
    method = get_method(name, **({"byot": own, "lsh": own} if "+" in name else own))
    once = train(build("test_vit"), method, **settings)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    resumed = train(build("test_vit"), method, resume=str(checkpoint), **settings)
    assert same_weights(resumed.model, once.model) and losses(resumed) == losses(once)
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert not any("average" in key for key in file.keys())


def test_a_new_run_starts_from_the_weights_it_finds(build, train):
    trainer = train(build("test_vit"), get_method("byot", teacher="ema", teacher_decay=0.999), max_steps=1)
    other_weights(trainer.model.backbone)
    before = copy.deepcopy(trainer.model.backbone.state_dict())
    trainer.args.learning_rate = 0.0
    trainer.train()
    average = trainer.scaffold.average.module.backbone.state_dict()
    for key, tensor in before.items():
        torch.testing.assert_close(average[key], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_one_graph_under_compile(build, batch):
    method = get_method("byot", teacher="ema")
    model = attached(method, build("test_vit"))
    expected = method.terms(model(batch["pixel_values"]), batch["labels"], 0.0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(method.terms(compiled(batch["pixel_values"]), batch["labels"], 0.0), expected)


def test_copies_and_precision(build, batch):
    model = attached(get_method("kd", teacher="ema"), build("test_vit"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = other(batch["pixel_values"]).scaffold["teacher_logits"]
        torch.testing.assert_close(found, model(batch["pixel_values"]).scaffold["teacher_logits"])
    half = build("test_vit").to(torch.bfloat16)
    teacher = AveragedTeacher(half, 0.999)
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.add_(1.0)
    teacher.follow(half)  # in bfloat16 a thousandth would be lost
    moved = next(iter(half.parameters())).float() - next(iter(teacher.parameters()))
    torch.testing.assert_close(moved, torch.full_like(moved, 0.999), atol=5e-3, rtol=0)


def test_errors(build):
    with pytest.raises(ValueError, match="KD takes teacher_decay with teacher='ema' only, but got teacher_decay=0.9"):
        get_method("kd", teacher="resnet18", teacher_decay=0.9)
    for decay in (1, -0.1, True, "0.9"):
        with pytest.raises(ValueError, match="BYOT needs 0 <= teacher_decay < 1, but got teacher_decay="):
            get_method("byot", teacher="ema", teacher_decay=decay)
    with pytest.raises(ValueError, match="BYOT needs teacher None .* or 'ema' .* but got teacher='resnet18'"):
        get_method("byot", teacher="resnet18")
    with pytest.raises(ValueError, match="LSH needs a teacher for bias='median'"):
        get_method("lsh", teacher="ema", bias="median")
    with pytest.raises(ValueError, match="LSH needs at least 2 exits, but the model has 1"):
        get_method("lsh", teacher="ema").attach(build(exits=[]))
    with pytest.raises(ValueError, match="BYOT was called without its averaged teacher"):
        model = build().train()
        get_method("byot", teacher="ema")(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]), 0.0)
