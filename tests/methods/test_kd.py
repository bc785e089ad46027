import math

import pytest
import timm
import torch

from hf_selfkd import get_method
from hf_selfkd.functional import smooth_labels, soften_kl
from hf_selfkd.methods.decoupled import decoupled_kl
from tests.helpers.runs import same_weights

SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": 32}
SWIN |= {"patch_size": 2, "window_size": 4}
BACKBONES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224"]


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=5)


def plain_kd(exit_logits, teacher_logits, labels, alpha, temperature):
    """Sum over exits of (1 - alpha) CE + alpha T^2 KL, number by number."""

    def softmax(row, temperature=1.0):
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    label = logit = 0.0
    for logits in exit_logits.tolist():
        for row, target, label_index in zip(logits, teacher_logits.tolist(), labels.tolist(), strict=True):
            label -= math.log(softmax(row)[label_index]) / len(logits)
            student, soft = softmax(row, temperature), softmax(target, temperature)
            logit += sum(p * math.log(p / q) for p, q in zip(soft, student, strict=True)) / len(logits)
    return (1 - alpha) * label, alpha * temperature**2 * logit


@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 4.0), (0.3, 1.0), (0.0, 2.0), (1.0, 2.0)])
def test_terms_are_the_papers(exits_of_vectors, alpha, temperature):
    output, labels = exits_of_vectors
    output.scaffold = {"teacher_logits": torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])}
    terms = get_method("kd", alpha=alpha, temperature=temperature)(output, labels, 0.0)
    expected = plain_kd(torch.stack(output.exit_logits), output.scaffold["teacher_logits"], labels, alpha, temperature)
    assert terms["label"].item() == pytest.approx(expected[0], abs=1e-5)
    assert terms["logit"].item() == pytest.approx(expected[1], abs=1e-5)


def test_defaults_and_agreement(exits_of_vectors):
    output, labels = exits_of_vectors
    method = get_method("kd")
    assert (method.temperature, method.min_exits, method.detach_exits) == (4.0, 1, False)
    output.scaffold = {"teacher_logits": output.exit_logits[0]}
    assert method(output, labels, 0.0) == get_method("kd", alpha=0.9)(output, labels, 0.0)
    output.exit_logits = output.exit_logits[-1:]
    output.scaffold = {"teacher_logits": output.exit_logits[-1]}
    assert method(output, labels, 0.0)["logit"].item() == pytest.approx(0, abs=1e-6)


def test_labels_may_be_probabilities(exits_of_vectors):
    output, labels = exits_of_vectors
    output.scaffold = {"teacher_logits": output.exit_logits[0]}
    method = get_method("kd")
    hard = method(output, labels, 0.0)
    one_hot = method(output, torch.nn.functional.one_hot(labels, 3).float(), 0.0)
    mixed = method(output, smooth_labels(labels, 3, 0.3), 0.0)
    torch.testing.assert_close(one_hot["label"], hard["label"])
    assert torch.equal(mixed["logit"], hard["logit"]) and mixed["label"] > hard["label"]


def test_to_dict_keeps_the_teacher_itself(teacher):
    method = get_method("kd", teacher=teacher)
    assert method.to_dict()["teacher"] is teacher
    assert get_method(**method.to_dict()) == method
    assert get_method("kd", teacher="resnet18").to_dict()["teacher"] == "resnet18"


def test_errors(build, exits_of_vectors):
    with pytest.raises(ValueError, match=r"KD needs a teacher, but got teacher=None.*get_method\('kd', teacher="):
        get_method("kd").scaffold(build())
    with pytest.raises(ValueError, match="KD was called without the logits of its teacher. Train with SelfDis"):
        get_method("kd")(*exits_of_vectors, 0.0)
    with pytest.raises(ValueError, match="KD needs 0 <= alpha <= 1, but got alpha=2"):
        get_method("kd", alpha=2)
    with pytest.raises(ValueError, match="KD needs temperature > 0, but got temperature=0"):
        get_method("kd", temperature=0)
    with pytest.raises(ValueError, match="KD needs loss 'kl' or 'dkd', but got loss='dkl'"):
        get_method("kd", loss="dkl")
    with pytest.raises(ValueError, match="KD takes non_target_weight with loss='dkd' only"):
        get_method("kd", non_target_weight=1.0)
    with pytest.raises(ValueError, match="KD needs alpha >= 0, but got alpha=-1"):
        get_method("kd", loss="dkd", alpha=-1)


def plain_dkd(student, teacher, label, temperature, beta):
    """Return the two divergences of one image, number by number."""

    def softmax(row):
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    p, q = softmax(teacher), softmax(student)
    target = p[label] * math.log(p[label] / q[label]) + (1 - p[label]) * math.log((1 - p[label]) / (1 - q[label]))
    others = [index for index in range(len(p)) if index != label]
    shares = [(p[index] / (1 - p[label]), q[index] / (1 - q[label])) for index in others]
    return temperature**2 * (target + beta * sum(a * math.log(a / b) for a, b in shares))


@pytest.mark.parametrize(("settings", "alpha", "beta"), [({}, 1, 8), ({"alpha": 2, "non_target_weight": 0.5}, 2, 0.5)])
def test_decoupled_loss_is_the_papers(exits_of_vectors, settings, alpha, beta):
    output, labels = exits_of_vectors
    teacher = [[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]
    output.scaffold = {"teacher_logits": torch.tensor(teacher)}
    terms = get_method("kd", loss="dkd", **settings)(output, labels, 0.0)
    expected = sum(
        plain_dkd(row, target, label, 4.0, beta) / len(labels)
        for logits in output.exit_logits
        for row, target, label in zip(logits.tolist(), teacher, labels.tolist(), strict=True)
    )
    assert terms["logit"].item() == pytest.approx(alpha * expected, abs=1e-5)
    assert get_method("kd", loss="dkd").paper != get_method("kd").paper
    assert torch.equal(terms["label"], get_method("deep_supervision")(output, labels, 0.0)["label"])


def test_decoupled_loss_with_the_teachers_own_weight_is_the_plain_divergence(exits_of_vectors):
    output, labels = exits_of_vectors
    logits, teacher = output.exit_logits[0][:1].requires_grad_(), torch.tensor([[2.0, 1.0, 0.0]])
    weight = 1 - (teacher / 3).softmax(dim=1)[0, labels[0]].item()
    decoupled, plain = decoupled_kl([logits], teacher, labels[:1], 3.0, weight), soften_kl(logits, teacher, 3.0)
    torch.testing.assert_close(decoupled, plain)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (decoupled, plain)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_labels_of_the_decoupled_loss():
    student, teacher = [torch.randn(3, 4)], 30 * torch.randn(3, 4)
    found = decoupled_kl(student, teacher, torch.tensor([1, 3, -100]), 1.0, 8.0)
    assert found.isfinite()
    torch.testing.assert_close(decoupled_kl([student[0][:2]], teacher[:2], torch.tensor([1, 3]), 1.0, 8.0), found)
    mixed = torch.tensor([[0.4, 0.6, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert torch.equal(decoupled_kl(student, teacher, mixed, 1.0, 8.0), found)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_learns(build, batch, teacher, backbone):
    model = build(backbone, **({"backbone_kwargs": SWIN} if backbone.startswith("swin") else {})).train()
    method = get_method("kd", teacher=teacher)
    model.scaffold = method.scaffold(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch["pixel_values"])
    terms = method(output, batch["labels"], 0.0)
    sum(terms.values()).backward()
    assert all(term.isfinite() and term > 0 for term in terms.values())
    learning = {name: p for name, p in model.named_parameters() if not name.startswith("scaffold.")}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning.values())


def test_trains_and_resumes(build, train, teacher, tmp_path):
    settings = {"num_train_epochs": 2, "save_strategy": "epoch", "label_smoothing_factor": 0.1}
    method = get_method("kd", teacher=teacher)
    once = train(build(), method, **settings)
    entry = once.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["loss/label"] + entry["loss/logit"], abs=1e-4)
    resumed = train(build(), method, resume=str(tmp_path / "run" / "checkpoint-4"), **settings)
    assert same_weights(resumed.model, once.model)
