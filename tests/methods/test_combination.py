import pytest
import timm
import torch
from torchvision.transforms import v2

from hf_selfkd import Method, get_method, list_methods
from hf_selfkd.functional import hash_projection
from hf_selfkd.methods.combination import Combination
from tests.helpers.runs import same_weights


def lsh_scaffold(output):
    weight = torch.tensor([[0.5, -1.0, 0.25, 0.5], [-0.5, 0.5, 1.0, -0.25]])
    projections = [hash_projection(features, weight, torch.zeros(2)) for features in output.exit_features]
    return {"student_projections": tuple(projections[:-1]), "teacher_projection": projections[-1]}


def test_terms_are_those_of_each_with_the_labels_of_the_first(exits_of_vectors):
    output, labels = exits_of_vectors
    eed = get_method("eed", feature_weight=0.5)(output, labels, 0.0)
    alone = lsh_scaffold(output)
    output.scaffold = alone
    lsh = get_method("lsh", mimic_weight=2.0)(output, labels, 0.0)
    output.scaffold = {"lsh": alone}
    both = get_method("eed+lsh", eed={"feature_weight": 0.5}, lsh={"mimic_weight": 2.0})(output, labels, 0.0)
    assert list(both) == ["eed/label", "eed/logit", "eed/feature", "lsh/feature", "lsh/hash"]
    for name, terms in (("eed", eed), ("lsh", lsh)):
        assert all(torch.equal(both[f"{name}/{key}"], term) for key, term in terms.items() if f"{name}/{key}" in both)
    assert output.scaffold == {"lsh": alone}
    assert list(get_method("lsh+eed")(output, labels, 0.0)) == [
        "lsh/label", "lsh/feature", "lsh/hash", "eed/logit", "eed/feature"
    ]  # fmt: skip


def test_three_methods(exits_of_vectors):
    output, labels = exits_of_vectors
    output.scaffold = {"kd": {"teacher_logits": output.exit_logits[0]}}
    terms = get_method("byot+deep_supervision+kd")(output, labels, 0.0)
    assert list(terms) == ["byot/label", "byot/logit", "byot/hint", "kd/logit"]


def test_is_a_method_that_is_not_listed(build):
    network = timm.create_model("test_resnet", num_classes=5)
    method = get_method("eed+lsh", eed={"output_loss": "kl"}, lsh={"teacher": network, "bias": "zero"})
    assert isinstance(method, Method) and method.name == "eed+lsh"
    assert not any("+" in name for name in list_methods()) and "combination" not in list_methods()
    assert method.paper == "https://arxiv.org/abs/2104.00299, https://arxiv.org/abs/2011.01424"
    settings = method.to_dict()
    assert settings["name"] == "eed+lsh" and settings["eed"]["output_loss"] == "kl"
    assert settings["lsh"]["teacher"] is network
    assert get_method(**settings) == method
    assert get_method(**settings) != get_method("eed+lsh")


@pytest.mark.parametrize(
    ("name", "settings", "detach_exits", "min_exits"),
    [
        ("eed+lsh", {}, False, 2),
        ("none+lsh", {"lsh": {"teacher": "resnet18"}}, True, 1),
        ("none+lsh", {}, False, 2),
        ("kd+lsh", {"lsh": {"teacher": "resnet18"}}, False, 1),
    ],
)
def test_requirements_of_the_parts(build, name, settings, detach_exits, min_exits):
    method = get_method(name, **settings)
    assert (method.detach_exits, method.min_exits) == (detach_exits, min_exits)
    method.check(build())
    if min_exits == 2:
        with pytest.raises(ValueError, match="needs at least 2 exits, but the model has 1"):
            method.check(build(exits=[]))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("none+byot", {"byot": {"alpha": 0.0}}),
        ("frskd+eed", {"eed": {"output_weight": 0.0}}),
        ("frskd+lsh", {}),
        ("none+deep_supervision", {}),
    ],
)
def test_every_parameter_gets_a_gradient(build, batch, name, settings):
    """Several processes wait for each of them."""
    model, method = build().train(), get_method(name, **settings)
    method.attach(model)
    terms = method.terms(model(batch["pixel_values"]), batch["labels"], 0.0)
    sum(terms.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_maps_are_returned_if_one_method_reads_them():
    class Reader(Method, registered=False):
        name = "reader"
        reads_maps = True

    byot = get_method("byot")
    assert Combination(methods=(byot, Reader())).reads_maps
    assert not Combination(methods=(byot, get_method("eed"))).reads_maps


def test_scaffolds_are_kept_apart(build, batch):
    model, network = build().train(), timm.create_model("test_resnet", num_classes=5)
    assert get_method("byot+eed").scaffold(model) is None
    method = get_method("eed+lsh+kd", kd={"teacher": network})
    model.scaffold = method.scaffold(model)
    assert set(model.scaffold.state_dict()) == {"lsh.weight", "lsh.bias"}
    output = model(batch["pixel_values"])
    assert output.scaffold.keys() == {"lsh", "kd"}
    assert torch.equal(output.scaffold["kd"]["teacher_logits"], network(batch["pixel_values"]))
    terms = method(output, batch["labels"], 0.0)
    assert list(terms) == ["eed/label", "eed/logit", "eed/feature", "lsh/feature", "lsh/hash", "kd/logit"]


def test_each_prepares_its_own_scaffold_from_all_batches(build, train, own_methods):
    seen = {}

    class Counting(Method):
        name = "counting"
        paper = "https://example.com"

        def prepare(self, model, batches):
            seen["scaffold"] = model.scaffold
            seen["images"] = sum(len(batch["labels"]) for batch in batches)

        def __call__(self, output, labels, epoch):
            return {"label": output.exit_logits[-1].mean()}

    network = timm.create_model("test_resnet", num_classes=5)
    method = get_method("none+lsh+counting", lsh={"teacher": network, "num_hashes": 8})
    trainer = train(build(), method, max_steps=1, eval_strategy="no")
    assert seen == {"scaffold": None, "images": 20}
    alone = train(build(), get_method("lsh", teacher=network, num_hashes=8), max_steps=1)
    assert alone.scaffold.bias.count_nonzero() == 8
    assert torch.equal(trainer.scaffold["lsh"].bias, alone.scaffold.bias)


def test_trains_and_resumes(build, train, tmp_path):
    settings = {"num_train_epochs": 2, "save_strategy": "epoch"}
    trainer = train(build(), "eed+lsh", **settings)
    entry = trainer.state.log_history[0]
    terms = [value for name, value in entry.items() if name.startswith("loss/")]
    assert len(terms) == 5 and entry["loss"] == pytest.approx(sum(terms), abs=1e-3)
    resumed = train(build(), "eed+lsh", resume=str(tmp_path / "run" / "checkpoint-4"), **settings)
    assert same_weights(resumed.model, trainer.model)


def test_trains_on_mixed_images(build, train):
    network = timm.create_model("test_resnet", num_classes=5)
    method = get_method("eed+lsh+kd", lsh={"teacher": network, "num_hashes": 16}, kd={"teacher": network})
    mix = v2.RandomChoice([v2.MixUp(num_classes=5), v2.CutMix(num_classes=5)])
    trainer = train(build(), method, trainer_kwargs={"mix": mix}, label_smoothing_factor=0.1, max_steps=4)
    for entry in trainer.state.log_history[:4]:
        terms = [value for name, value in entry.items() if name.startswith("loss/")]
        assert len(terms) == 6 and entry["loss"] == pytest.approx(sum(terms), abs=1e-3)


def test_errors(exits_of_vectors):
    with pytest.raises(ValueError, match="Unknown method 'lhs'. Did you mean 'lsh'"):
        get_method("eed+lhs")
    with pytest.raises(ValueError, match="A combination takes each method once, but got 'eed[+]eed'"):
        get_method("eed+eed")
    with pytest.raises(
        ValueError, match="eed[+]lsh has no hyper-parameter 'eeed'. Did you mean 'eed'. Available: eed"
    ):
        get_method("eed+lsh", eeed={})
    with pytest.raises(ValueError, match="EED has no hyper-parameter 'mimic_weight'"):
        get_method("eed+lsh", eed={"mimic_weight": 1.0})
    with pytest.raises(ValueError, match="'eed[+]lsh' takes the hyper-parameters of lsh as a dictionary, but got 5.0"):
        get_method("eed+lsh", lsh=5.0)
    with pytest.raises(ValueError, match="LSH was called without its hash layer. Train with SelfDistillationTrainer"):
        get_method("eed+lsh")(*exits_of_vectors, 0.0)
