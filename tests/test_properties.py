"""Configurations, policies, methods and losses accept any value that works, and name the field of any other."""

import json
import warnings
from dataclasses import fields, replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_selfkd import ExitPolicy, MultiExitConfig, MultiExitOutput, get_method, list_methods
from hf_selfkd.functional import cross_entropy, smooth_labels, soften_kl

quick = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
FIELDS = {
    "backbone": st.sampled_from(["resnet18", "hf-hub:x", "a/b", ""]),
    "backbone_kwargs": st.dictionaries(st.sampled_from(["in_chans", "pretrained", "img_size"]), st.integers(1, 4)),
    "exits": st.lists(st.integers(0, 5), max_size=4),
    "exit_width": st.integers(-1, 64),
    "pyramid_width": st.integers(-1, 64),
    "small_input_stem": st.booleans(),
    "exit_policy": st.just({"criterion": "confidence"}),
    "early_exit": st.booleans(),
    "ensemble": st.booleans(),
    "pretrained_cfg": st.just({"input_size": [3, 32, 32]}),
    "image_processor_type": st.just("TimmWrapperImageProcessor"),
    "semantic_loss_ignore_index": st.integers(-100, 255),
    "num_labels": st.integers(-1, 10),
    "id2label": st.dictionaries(st.integers(0, 2) | st.sampled_from(["0", "1"]), st.text(max_size=3), max_size=3),
    "label2id": st.dictionaries(st.text(max_size=3), st.integers(0, 2), max_size=3),
    "problem_type": st.sampled_from(["regression", "single_label_classification", "multi_label_classification"]),
    "dtype": st.sampled_from(["float32", "bfloat16", "float33"]),
}


@quick
@given(st.fixed_dictionaries({}, optional={name: values | anything for name, values in FIELDS.items()}))
def test_a_configuration_works_or_names_the_field(given_fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            config = MultiExitConfig(**given_fields)
        except ValueError as error:
            assert any(name in str(error) for name in given_fields), (given_fields, error)
            return
    again = MultiExitConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()


@quick
@given(
    st.fixed_dictionaries(
        {"thresholds": st.lists(st.floats(0, 2), max_size=3) | anything},
        optional={
            "criterion": st.sampled_from(["confidence", "entropy", "margin", "patience", "luck"]) | anything,
            "temperatures": st.lists(st.floats(0.01, 10), max_size=4) | anything,
            "calibration": anything,
            "epsilon": anything,
        },
    ),
    st.integers(1, 4),
)
def test_a_policy_works_or_names_the_field(given_fields, num_exits):
    try:
        policy = ExitPolicy.from_dict(given_fields)
    except ValueError as error:
        named = {"criterion", "thresholds", "temperatures", "calibration", "epsilon"}
        assert any(name in str(error) for name in named), (given_fields, error)
        return
    assert ExitPolicy.from_dict(policy.to_dict()) == policy
    logits = 50 * torch.randn(num_exits, 3, 5, generator=torch.Generator().manual_seed(0))
    try:
        exit_index, chosen = policy.decide(logits)
    except ValueError as error:
        assert num_exits != policy.num_exits
        assert f"is for {policy.num_exits} exits, but there are {num_exits}" in str(error)
        return
    assert torch.equal(chosen, logits[exit_index, torch.arange(3)])


@quick
@given(st.sampled_from(list_methods()), st.data())
def test_a_hyperparameter_works_or_is_named(name, chosen):
    default = get_method(name, teacher=torch.nn.Identity()) if name == "kd" else get_method(name)
    field = chosen.draw(st.sampled_from([field.name for field in fields(default) if field.name != "teacher"] or ["x"]))
    try:
        method = replace(default, **{field: chosen.draw(anything)})
    except (ValueError, TypeError) as error:
        assert field in str(error), (name, field, error)
        return
    assert get_method(**method.to_dict()) == method


logits = st.tuples(st.integers(1, 4), st.integers(1, 5), st.sampled_from([1e-3, 1.0, 1e4, 1e30]))


def draw(batch: int, classes: int, scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))


@quick
@given(
    logits,
    st.lists(st.integers(0, 6), min_size=0, max_size=2),
    st.sampled_from([torch.long, torch.int32, torch.uint8, torch.float32, torch.bool]),
)
def test_cross_entropy_works_or_describes_the_labels(shape, label_shape, dtype):
    batch, classes, _ = shape
    labels = torch.zeros(label_shape, dtype=dtype)
    try:
        loss = cross_entropy(draw(*shape), labels)
    except ValueError as error:
        assert (
            f"labels must be class indices shaped ({batch},) or class probabilities shaped ({batch}, {classes})"
            in str(error)
        )
        assert list(labels.shape) != [batch] or dtype == torch.float32
        return
    assert loss.shape == () and loss.isfinite() and loss >= 0


@quick
@given(logits, st.floats(0.1, 20), st.floats(0, 1), st.data())
def test_losses_are_finite_and_not_negative(shape, temperature, smoothing, chosen):
    batch, classes, scale = shape
    scale = min(scale, 1e4)  # beyond, the true loss over the squared temperature is none that float32 holds
    labels = torch.tensor(chosen.draw(st.lists(st.integers(-1, classes - 1), min_size=batch, max_size=batch)))
    labels = labels.masked_fill(labels < 0, -100)
    student, teacher = draw(batch, classes, scale), draw(batch, classes, scale, seed=1)
    for loss in (
        cross_entropy(student, labels),
        cross_entropy(student, smooth_labels(labels, classes, smoothing)),
        soften_kl(student, teacher, temperature),
    ):
        assert loss.isfinite() and loss >= -1e-6 * max(1, temperature) ** 2  # of rounding
    assert soften_kl(student, student, temperature) == 0


@quick
@given(
    st.sampled_from(["byot", "deep_supervision", "eed", "none"]),
    st.lists(logits, min_size=1, max_size=3),
    st.integers(1, 8),
)
def test_methods_return_finite_terms(name, shapes, width):
    batch, classes, _ = shapes[0]
    exits = [draw(batch, classes, min(scale, 1e4), seed) for seed, (_, _, scale) in enumerate(shapes)]
    features = tuple(torch.ones(batch, width) * index for index in range(len(exits)))
    output = MultiExitOutput(logits=exits[-1], exit_logits=tuple(exits), exit_features=features)
    terms = get_method(name)(output, torch.zeros(batch, dtype=torch.long), 0.0)
    assert all(term.shape == () and term.isfinite() for term in terms.values())
