"""Methods on multi-label models: binary losses by the papers' formulas, and refusals by name."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hf_selfkd import Method, get_method
from hf_selfkd.functional import add, binary_cross_entropy, binary_kl, mse
from hf_selfkd.models.outputs import MultiLabelOutput
from tests.helpers.methods import METHODS

MULTI_LABEL = {"problem_type": "multi_label_classification"}
TASK = "multi-label-classification"
ABLE = [name for name in METHODS if TASK in type(get_method(name)).tasks]
UNABLE = [name for name in METHODS if name not in ABLE]


def arguments(name):
    return {"teacher": timm.create_model("test_resnet", num_classes=5)} if name == "kd" else {}


def dkd():
    return get_method("kd", loss="dkd", **arguments("kd"))


@pytest.fixture
def label_sets():
    return (torch.rand(8, 5) > 0.6).long()


@pytest.fixture
def exits():
    """Return the output of three exits for six images of four classes, and labels, one of them unknown."""
    logits = tuple(torch.randn(6, 4) for _ in range(3))
    features = tuple(torch.randn(6, 8) for _ in range(3))
    labels = (torch.rand(6, 4) > 0.6).float()
    labels[2, 1] = torch.nan
    return MultiLabelOutput(logits=logits[-1], exit_logits=logits, exit_features=features), labels


def test_most_methods_train_multi_label_models():
    assert {"none", "deep_supervision", "byot", "eed", "frskd", "lsh", "okd_mde", "kd"} <= set(ABLE)


@pytest.mark.parametrize("name", ABLE)
def test_every_parameter_learns_from_binary_losses(build, batch, label_sets, name):
    method, model = get_method(name, **arguments(name)), build(**MULTI_LABEL).train()
    method.attach(model)
    output = model(batch["pixel_values"])
    terms, as_floats = (method.terms(output, labels, 1.5) for labels in (label_sets, label_sets.float()))
    assert_close(terms, as_floats)
    add(terms.values()).backward()
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert [key for key, value in trained.items() if value.grad is None or not value.grad.isfinite().all()] == []
    assert method.terms(output, torch.full((8, 5), -100), 1.5)["label"].item() == 0


@pytest.mark.parametrize("name", ABLE)
def test_label_terms_push_every_logit_towards_its_own_label(build, batch, label_sets, name):
    method, model = get_method(name, **arguments(name)), build(**MULTI_LABEL).train()
    method.attach(model)
    output = model(batch["pixel_values"])
    (gradient,) = torch.autograd.grad(method.terms(output, label_sets, 1.5)["label"], output.exit_logits[-1])
    assert torch.equal(gradient < 0, label_sets == 1)  # a softmax pushes the sum of an image's gradients to 0


# Formulas


def test_byot(exits):
    output, labels = exits
    *early, final = output.exit_logits
    terms = get_method("byot", alpha=0.3, temperature=3.0, hint_weight=0.1)(output, labels, 0.0)
    bce = [binary_cross_entropy(logits, labels) for logits in output.exit_logits]
    assert_close(terms["label"], bce[2] + 0.7 * (bce[0] + bce[1]))
    assert_close(terms["logit"], 0.3 * add(binary_kl(logits, final, 3.0) for logits in early))
    assert_close(terms["hint"], 0.1 * add(mse(f, output.exit_features[-1]) for f in output.exit_features[:-1]))


def test_dks(exits):
    output, labels = exits
    terms = get_method("dks", synergy_weight=2.0)(output, labels, 0.0)
    pairs = [(a, b) for a in output.exit_logits for b in output.exit_logits if a is not b]
    assert_close(terms["synergy"], 2 * add(binary_kl(student, teacher, 1.0) for student, teacher in pairs))


def test_eed(exits):
    output, labels = exits
    terms = get_method("eed", output_loss="kl")(output, labels, 0.0)
    assert_close(terms["label"], add(binary_cross_entropy(logits, labels) for logits in output.exit_logits))
    ensemble = output.ensemble_logits
    assert_close(terms["logit"], 0.1 * add(binary_kl(logits, ensemble, 3.0) for logits in output.exit_logits))
    raw = get_method("eed")(output, labels, 0.0)["logit"]
    assert_close(raw, add(F.mse_loss(logits, ensemble) for logits in output.exit_logits))


def test_kd_number_by_number(exits):
    output, labels = exits
    teacher = torch.randn(6, 4)
    output.scaffold = {"teacher_logits": teacher}
    terms = get_method("kd", alpha=0.6, temperature=2.0)(output, labels, 0.0)
    label = logit = 0.0
    for logits in output.exit_logits:
        for image, label_set, soft in zip(logits.tolist(), labels.tolist(), teacher.tolist(), strict=True):
            known = [(z, y) for z, y in zip(image, label_set, strict=True) if y == y]
            label += sum(math.log1p(math.exp(-z if y else z)) for z, y in known) / len(known) / 6
            for z, t in zip(image, soft, strict=True):
                q, p = 1 / (1 + math.exp(-z / 2)), 1 / (1 + math.exp(-t / 2))
                logit += 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 24
    assert terms["label"].item() == pytest.approx(0.4 * label, rel=1e-5)
    assert terms["logit"].item() == pytest.approx(0.6 * logit, rel=1e-5)


def test_lsh_mimics_all_images(exits):
    output, labels = exits
    projections = torch.randn(3, 6, 16)
    output.scaffold = {"teacher_projection": projections[2], "student_projections": tuple(projections[:2])}
    method = get_method("lsh", mimic_weight=1.0)  # with correct_only, which is for single labels
    features = add(F.mse_loss(f, output.exit_features[-1]) for f in output.exit_features[:-1])
    assert_close(method(output, labels, 0.0)["feature"], features)


def test_a_combination_trains_what_all_its_methods_do(exits):
    output, labels = exits
    both = get_method("eed+byot")
    assert set(both.tasks) == {"image-classification", TASK}
    terms = both.terms(output, labels, 0.0)
    assert_close(terms["byot/logit"], get_method("byot")(output, labels, 0.0)["logit"])


# Refusals


@dataclass(frozen=True, kw_only=True)
class Softmax(Method, registered=False):
    """A method that knows classes only, as own methods do by default."""

    name: ClassVar[str] = "softmax"
    paper: ClassVar[str] = ""

    def __call__(self, output, labels, epoch):
        return {"label": F.cross_entropy(output.logits, labels)}


@pytest.mark.parametrize("method", [Softmax(), *(get_method(name) for name in UNABLE)], ids=lambda method: method.name)
def test_other_methods_are_refused_before_the_first_step(build, batch, label_sets, train, method):
    words = rf"{type(method).__name__} trains models for .* for {TASK}. Methods for {TASK}: .*byot.*kd"
    with pytest.raises(ValueError, match=words):
        method.attach(build(**MULTI_LABEL))
    with pytest.raises(ValueError, match=words):
        train(build(**MULTI_LABEL), method)


def test_the_decoupled_loss_is_refused(build, exits):
    output, labels = exits
    output.scaffold = {"teacher_logits": torch.randn(6, 4)}
    for call in (lambda: dkd().attach(build(**MULTI_LABEL)), lambda: dkd().terms(output, labels, 0.0)):
        with pytest.raises(ValueError, match="KD with loss='dkd' separates the class of the label .* Take loss='kl'"):
            call()
    dkd().attach(build())


def test_problem_type_set_after_attach_is_noticed(build, batch, label_sets):
    method, model = Softmax(), build().train()
    method.attach(model)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=f"Softmax trains models for .* but the model is one for {TASK}"):
        method.terms(model(batch["pixel_values"]), label_sets, 0.0)


def test_a_teacher_of_the_other_kind_is_refused(build):
    for teacher, student in ((build(), build(**MULTI_LABEL)), (build(**MULTI_LABEL), build())):
        with pytest.raises(ValueError, match="The teacher has problem_type=.* Choose a teacher that was trained for"):
            get_method("kd", teacher=teacher).attach(student)
    get_method("kd", teacher=build("test_vit", **MULTI_LABEL)).attach(build(**MULTI_LABEL))
