"""Multi-label models: their loss, problem_type, and exit policies on sigmoid outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, PreTrainedConfig
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from hf_selfkd import ExitPolicy, MultiExitConfig
from hf_selfkd.functional import label_loss
from hf_selfkd.models.criteria import CRITERIA
from hf_selfkd.models.multi_label import binary_cross_entropy, is_exact_match
from hf_selfkd.models.outputs import MultiExitOutput, MultiLabelOutput

MULTI_LABEL = {"problem_type": "multi_label_classification"}
of_sigmoids = pytest.mark.parametrize("criterion", ["min_confidence", "mean_confidence"])


@pytest.fixture
def label_sets():
    return (torch.rand(8, 5) > 0.6).long()


# Loss


def test_the_loss_is_the_one_of_transformers(label_sets):
    logits = torch.randn(8, 5)
    config = PreTrainedConfig(num_labels=5, **MULTI_LABEL)
    expected = ForSequenceClassificationLoss(label_sets.float(), logits, config)
    for labels in (label_sets, label_sets.bool(), label_sets.to(torch.uint8), label_sets.double()):
        assert_close(binary_cross_entropy(logits, labels), expected)
    both = binary_cross_entropy([logits, 2 * logits], label_sets)
    assert_close(both, expected + F.binary_cross_entropy_with_logits(2 * logits, label_sets.float()))


@pytest.mark.parametrize("unknown", [-100, torch.nan])
def test_the_loss_is_a_mean_over_known_labels_then_over_images(unknown):
    logits = torch.randn(3, 4, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 0.3, 0.0], [1.0, unknown, unknown, 0.0], [unknown] * 4])
    rows = [F.binary_cross_entropy_with_logits(logits[0], labels[0])]
    rows.append(F.binary_cross_entropy_with_logits(logits[1, [0, 3]], labels[1, [0, 3]]))
    loss = binary_cross_entropy(logits, labels)
    assert_close(loss, sum(rows) / 2)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert ((gradient == 0) == labels.isnan() if unknown != -100 else (gradient == 0) == (labels == -100)).all()
    assert binary_cross_entropy(logits, torch.full((3, 4), unknown)).item() == 0


def test_a_run_may_replace_the_loss_as_it_may_the_cross_entropy(label_sets):
    logits, weight = torch.randn(8, 5), torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0])
    weighted = torch.nn.BCEWithLogitsLoss(pos_weight=weight)
    with label_loss(lambda logits, labels: weighted(logits, labels.float())) as losses:
        both = binary_cross_entropy([logits, logits], label_sets)
    assert_close(both, 2 * weighted(logits, label_sets.float()))
    assert len(losses) == 2


@pytest.mark.parametrize("labels", [torch.tensor([1, 2, 3]), torch.zeros(3, 5)])
def test_labels_of_another_shape_are_refused(labels):
    with pytest.raises(ValueError, match=r"needs labels shaped \(3, 4\), 0 or 1 for every class .* but got torch"):
        binary_cross_entropy(torch.zeros(3, 4), labels)


def test_an_exact_match_counts_known_labels_only():
    predictions = torch.tensor([[1, 0, 1], [1, 0, 1], [1, 1, 1]]).bool()
    labels = torch.tensor([[1.0, 0.0, 1.0], [1.0, torch.nan, -100.0], [1.0, 0.0, torch.nan]])
    assert is_exact_match(predictions, labels).tolist() == [True, True, False]


# Models


def test_problem_type_makes_a_multi_label_model(build, batch, label_sets):
    model = build(**MULTI_LABEL).eval()
    output = model(batch["pixel_values"], labels=label_sets)
    assert isinstance(output, MultiLabelOutput) and output.is_multi_label
    assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, label_sets.float()))
    assert model.task == "multi-label-classification"
    model.config.ensemble = True
    ensemble = model(batch["pixel_values"], labels=label_sets)
    assert_close(ensemble.loss, F.binary_cross_entropy_with_logits(output.ensemble_logits, label_sets.float()))


def test_problem_type_may_be_set_at_any_time(build, batch, label_sets):
    model = build().eval()
    assert type(model(batch["pixel_values"])) is MultiExitOutput
    model.config.problem_type = "multi_label_classification"
    output = model(batch["pixel_values"], labels=label_sets)
    assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, label_sets.float()))
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="problem_type must be .* but got 'regression'"):
        model(batch["pixel_values"])
    with pytest.raises(ValueError, match="problem_type must be .* but got 'regression'"):
        model.task  # noqa: B018


def test_a_checkpoint_stays_multi_label(build, tmp_path):
    build(**MULTI_LABEL).save_pretrained(tmp_path / "label_sets")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "label_sets").config.is_multi_label
    build().save_pretrained(tmp_path / "classes")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "classes", **MULTI_LABEL)
    assert loaded.task == "multi-label-classification"
    assert MultiExitConfig(num_labels=1, **MULTI_LABEL).is_multi_label  # one binary decision


def test_segmentation_has_one_class_per_pixel(build_segmenter, batch):
    with pytest.raises(ValueError, match="problem_type='multi_label_classification' is for image classification"):
        build_segmenter(**MULTI_LABEL)
    model = build_segmenter()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="Set problem_type to None"):
        model(batch["pixel_values"])


@pytest.mark.slow
def test_a_compiled_model_returns_the_same(build, batch, label_sets):
    model = build("test_vit", backbone_kwargs={"img_size": 32, "patch_size": 8, "depth": 2}, **MULTI_LABEL)
    expected = model(batch["pixel_values"], labels=label_sets)
    torch._dynamo.reset()
    output = torch.compile(model.forward, backend="eager", fullgraph=True)(batch["pixel_values"], labels=label_sets)
    assert type(output) is MultiLabelOutput
    assert_close(output.loss, expected.loss)


# Exit policies


def test_scores_are_those_of_the_binary_decisions():
    logits = torch.tensor([[0.0, 4.0, -4.0], [2.0, -2.0, 2.0], [800.0, -800.0, 90.0]])
    probabilities = (logits / 2).sigmoid()
    certainty = torch.maximum(probabilities, 1 - probabilities)
    for criterion, expected in {"min_confidence": certainty.amin(1), "mean_confidence": certainty.mean(1)}.items():
        policy = ExitPolicy(criterion=criterion, thresholds=[0.5], temperatures=[2.0, 1.0])
        scores, confidence, history = policy.score(0, logits)
        assert_close(scores, expected)
        assert torch.equal(scores, confidence) and history is None
        assert scores[2] == 1 < CRITERIA[criterion].never(2)


@of_sigmoids
def test_early_exit_equals_running_all_exits_and_choosing(build, criterion):
    model = build(**MULTI_LABEL).eval()
    images = torch.randn(12, 3, 32, 32) * torch.linspace(0.2, 3, 12).view(-1, 1, 1, 1)
    with torch.no_grad():
        exit_logits = model(images).exit_logits
    median = ExitPolicy(criterion=criterion, thresholds=[0.0] * 3).score(0, exit_logits[0])[0].median().item()
    policy = ExitPolicy(criterion=criterion, thresholds=[median, 2.0, median])
    exit_index, logits = policy.decide(exit_logits)
    assert 0 < (exit_index == 0).sum() < 12
    output = model.early_exit(images, policy)
    assert torch.equal(output.exit_index, exit_index)
    assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    model.config.exit_policy, model.config.early_exit = policy.to_dict(), True
    assert torch.equal(model(images).exit_index, exit_index)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_policies_for_other_outputs_are_refused_by_name(build, criterion, tmp_path):
    fits, other = (MULTI_LABEL, {}) if CRITERIA[criterion].multi_label else ({}, MULTI_LABEL)
    policy = ExitPolicy(criterion=criterion, thresholds=[0.9] * 3)
    build(exit_policy=policy.to_dict(), **fits)
    names = ", ".join(name for name in CRITERIA if CRITERIA[name].multi_label != CRITERIA[criterion].multi_label)
    words = f"The criterion '{criterion}' scores .* Calibrate with one of {names}"
    with pytest.raises(ValueError, match=words):
        build(exit_policy=policy.to_dict(), **other)
    model = build(**other).eval()
    with pytest.raises(ValueError, match=words):
        model.early_exit(torch.zeros(1, 3, 32, 32), policy)
