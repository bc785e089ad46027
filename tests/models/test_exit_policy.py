import json
import math

import pytest
import torch
from torch import nn

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, calibrate
from hf_selfkd.models.criteria import CRITERIA, Criterion

every_criterion = pytest.mark.parametrize("criterion", CRITERIA)
of_a_softmax = pytest.mark.parametrize("criterion", [name for name in CRITERIA if not CRITERIA[name].multi_label])


# Scores


def test_scores_are_those_of_their_definitions():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    weights = [math.exp(1.0), math.exp(0.5), 1.0]
    first, second, third = (weight / sum(weights) for weight in weights)
    entropy = -sum(p * math.log(p) for p in (first, second, third))
    expected = {
        "confidence": [first, 1 / 3],
        "margin": [first - second, 0.0],
        "entropy": [1 - entropy / math.log(3), 0.0],
    }
    for criterion, values in expected.items():
        policy = ExitPolicy(criterion=criterion, thresholds=[0.5], temperatures=[2.0, 1.0])
        scores, confidence, history = policy.score(0, logits)
        torch.testing.assert_close(scores, torch.tensor(values), atol=1e-6, rtol=0)
        torch.testing.assert_close(confidence, torch.tensor([first, 1 / 3]))
        assert history is None


def test_patience_counts_consecutive_exits_with_the_same_prediction():
    predictions = torch.tensor([[0, 1, 2], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
    exit_logits = nn.functional.one_hot(predictions, 3).float()
    policy = ExitPolicy(criterion="patience", thresholds=[1, 1, 2])
    streaks, history = [], None
    for exit, logits in enumerate(exit_logits):
        scores, _, history = policy.score(exit, logits, history)
        streaks.append(scores.tolist())
    assert streaks == [[0, 0, 0], [1, 1, 0], [2, 0, 1], [3, 1, 0]]
    exit_index, logits = policy.decide(exit_logits)
    assert exit_index.tolist() == [1, 1, 3]
    assert logits.argmax(dim=1).tolist() == [0, 1, 1]


@of_a_softmax
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saturated_softmax_gives_no_nan(criterion, dtype):
    largest = torch.finfo(dtype).max
    logits = torch.tensor(
        [[largest, -largest, 0.0], [math.inf, 0.0, -math.inf], [math.inf, math.inf, 0.0], [90.0, -90.0, 0.0]]
    ).to(dtype)
    policy = ExitPolicy(criterion=criterion, thresholds=[1.0], temperatures=[0.05, 0.05])
    _, _, history = policy.score(0, logits)
    scores, confidence, _ = policy.score(1, logits, history)
    assert scores.dtype == confidence.dtype == torch.float32
    assert scores.isfinite().all() and confidence.isfinite().all()
    assert scores[[0, 1, 3]].tolist() == [1.0, 1.0, 1.0]
    exits = [1, 1] if criterion == "patience" else [0, 0]
    assert policy.decide(torch.stack([logits, logits]))[0].tolist()[:2] == exits


@pytest.mark.parametrize("classes", [1, 2])
@of_a_softmax
def test_few_classes(criterion, classes):
    scores, confidence, _ = ExitPolicy(criterion=criterion, thresholds=[0.5]).score(0, torch.zeros(3, classes))
    assert confidence.tolist() == [1 / classes] * 3
    expected = {"confidence": 1 / classes, "patience": 0.0}.get(criterion, 2.0 - classes)
    assert scores.tolist() == [expected] * 3


# Records


@of_a_softmax
def test_scores_stay_in_their_range(criterion):
    record = CRITERIA[criterion]
    policy, history = ExitPolicy(criterion=criterion, thresholds=[0.0] * 4), None
    for exit in range(5):
        logits = nn.functional.one_hot(torch.arange(60) % 5, 5) * torch.linspace(0, 200, 60).unsqueeze(1)
        scores, _, history = policy.score(exit, logits, history)
        assert scores.min() >= 0 and scores.max() == record.max_score(exit) < record.never(5)
    assert (history is not None) == record.uses_history


@every_criterion
def test_only_criteria_that_use_temperatures_depend_on_them(criterion):
    logits = torch.randn(50, 5)
    scores = [
        ExitPolicy(criterion=criterion, thresholds=[0.5], temperatures=[temperature, 1.0]).score(0, logits)[0]
        for temperature in (1.0, 3.0)
    ]
    assert torch.equal(*scores) != CRITERIA[criterion].uses_temperature


def runner_up(probabilities, history):
    return 1 - probabilities.sort(dim=-1).values[:, -2], None


def test_a_record_is_all_that_a_criterion_needs(monkeypatch):
    description = "one minus the second largest softmax probability"
    record = Criterion(name="runner_up", description=description, score=runner_up)
    monkeypatch.setitem(CRITERIA, "runner_up", record)
    torch.manual_seed(0)
    model = MultiExitForImageClassification.from_backbone("test_resnet", num_labels=5).eval()
    images = torch.randn(12, 3, 32, 32) * torch.linspace(0.2, 3, 12).view(-1, 1, 1, 1)
    with torch.no_grad():
        exit_logits = torch.stack(model(images).exit_logits)
    policy = calibrate(exit_logits, torch.arange(12) % 5, [1, 2, 3, 4], criterion="runner_up", target_cost=0.6)
    expected = 1 - (exit_logits[0] / policy.temperatures[0]).softmax(dim=1).topk(2).values[:, 1]
    torch.testing.assert_close(policy.score(0, exit_logits[0])[0], expected)
    exit_index, _ = ExitPolicy.from_dict(policy.to_dict()).decide(exit_logits)
    assert exit_index.min() < 3
    assert torch.equal(model.early_exit(images, policy).exit_index, exit_index)


# Thresholds


@every_criterion
def test_thresholds_at_both_ends(criterion):
    exit_logits = torch.randn(3, 50, 5) * 20
    never = CRITERIA[criterion].max_score(2) + 1e-6
    always = ExitPolicy(criterion=criterion, thresholds=[0, 0]).decide(exit_logits)
    not_once = ExitPolicy(criterion=criterion, thresholds=[never, never]).decide(exit_logits)
    assert always[0].tolist() == [0] * 50 and torch.equal(always[1], exit_logits[0])
    assert not_once[0].tolist() == [2] * 50 and torch.equal(not_once[1], exit_logits[2])


@pytest.mark.parametrize(
    ("criterion", "thresholds", "reachable", "needed"),
    [
        ("confidence", [0.0, 1.0, 1.01], [True, True, False], [True, True, False]),
        ("entropy", [2.0, 0.5, 2.0], [False, True, False], [False, True, False]),
        # At exit 0 the streak is 0. The heads before a reachable exit are needed for its streak.
        ("patience", [1, 3, 2], [False, False, True], [True, True, True]),
        ("patience", [0, 2, 3], [True, False, False], [True, False, False]),
    ],
)
def test_a_head_is_needed_where_its_prediction_can_decide(criterion, thresholds, reachable, needed):
    policy = ExitPolicy(criterion=criterion, thresholds=thresholds)
    assert [policy.is_reachable(exit) for exit in range(4)] == [*reachable, True]
    assert [policy.listens(exit) for exit in range(3)] == needed


def test_decide_takes_arrays():
    exit_logits = torch.randn(3, 20, 5)
    policy = ExitPolicy(thresholds=[0.6, 0.5])
    exit_index, logits = policy.decide(exit_logits.numpy())
    assert torch.equal(exit_index, policy.decide(list(exit_logits))[0])
    assert set(exit_index.tolist()) == {0, 1, 2}
    assert torch.equal(logits, exit_logits[exit_index, torch.arange(20)])


# Saved policies


def test_a_policy_survives_json():
    policy = ExitPolicy(criterion="margin", thresholds=[0.1, 0.7], temperatures=[1.5, 1.2, 0.9], calibration={"a": 1})
    fields = json.loads(json.dumps(policy.to_dict()))
    assert fields.keys() == {"criterion", "thresholds", "temperatures", "calibration"}
    assert ExitPolicy.from_dict(fields) == policy
    assert "calibration" not in ExitPolicy(thresholds=[0.5]).to_dict()
    assert ExitPolicy(thresholds=[0.5, 0.5]).temperatures == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"criterion": "entropie"},
            "Unknown criterion 'entropie'. Did you mean 'entropy'? Available: confidence, entropy, margin, patience, ",
        ),
        ({"criterion": ["entropy"]}, "Unknown criterion ['entropy']."),
        ({"thresholds": 0.5}, "thresholds must be a list of numbers at least 0, but got 0.5."),
        ({"thresholds": [-0.1]}, "thresholds must be a list of numbers at least 0, but got [-0.1]."),
        ({"thresholds": [math.nan]}, "thresholds must be a list of numbers at least 0, but got [nan]."),
        ({"thresholds": [True]}, "thresholds must be a list of numbers at least 0, but got [True]."),
        ({"temperatures": [1.0, 0.0]}, "temperatures must be a list of numbers above 0, but got [1.0, 0.0]."),
        ({"temperatures": [1.0]}, "one more, but got 1 thresholds and 1 temperatures."),
        ({"calibration": 3}, "calibration must be a dictionary or None, but got 3."),
        ({"threshold": 3}, "An exit policy has criterion, thresholds, temperatures and calibration, not threshold."),
    ],
)
def test_a_bad_policy_is_refused(fields, words):
    with pytest.raises(ValueError) as error:
        ExitPolicy.from_dict({"criterion": "confidence", "thresholds": [0.5], "temperatures": [1.0, 1.0]} | fields)
    assert words in str(error.value)


FRONTIER = {
    "costs": [0.5, 1.0],
    "thresholds": [[0.0], [0.7], [2.0]],
    "exit_counts": [[10, 0], [6, 4], [0, 10]],
    "correct": [6, 8, 9],
}


def test_a_policy_moves_along_its_frontier():
    record = {"demand": {"max_risk": 0.1, "delta": 0.05}, "samples": 15, "full_accuracy": 0.9, "frontier": FRONTIER}
    policy = ExitPolicy(thresholds=[0.8], temperatures=[2.0, 1.0], calibration=record)
    restored = ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict())))
    assert restored.at(0.75) == policy.at(0.75)
    assert [policy.at(cost).thresholds[0] for cost in (0.5, 0.69, 0.7, 0.99, 1)] == [0.0, 0.0, 0.7, 0.7, 2.0]
    assert policy.at(0.75).temperatures == (2.0, 1.0)
    assert policy.at(0.75).calibration == record | {
        "demand": {"target_cost": 0.75},
        "samples": 10,
        "expected_cost": 0.7,
        "expected_accuracy": 0.8,
        "exit_counts": [6, 4],
    }


@pytest.mark.parametrize(
    ("calibration", "target_cost", "words"),
    [
        (None, 0.5, "The policy has no frontier: .* Calibrate it again."),
        ({"demand": {"target_cost": 0.5}}, 0.5, "The policy has no frontier"),  # of an earlier version
        ({"frontier": FRONTIER}, 0.4, "target_cost=0.4 is below the share 0.5 of the full cost"),
        ({"frontier": FRONTIER}, 1.5, "ExitPolicy.at needs 0 < target_cost <= 1, but got target_cost=1.5."),
        ({"frontier": FRONTIER}, "0.5", "needs 0 < target_cost <= 1, but got target_cost='0.5'."),
        ({"frontier": FRONTIER | {"correct": [6]}}, 0.5, "has a frontier that cannot be read"),
        ({"frontier": FRONTIER | {"exit_counts": [[0, 0]] * 3}}, 0.5, "has a frontier that cannot be read"),
        ({"frontier": [1, 2]}, 0.5, "has a frontier that cannot be read"),
        ({"frontier": FRONTIER | {"thresholds": ["a", "b", "c"]}}, 0.5, "thresholds must be a list of numbers"),
    ],
)
def test_a_frontier_that_does_not_help_is_refused(calibration, target_cost, words):
    with pytest.raises(ValueError, match=words):
        ExitPolicy(thresholds=[0.8], calibration=calibration).at(target_cost)


def test_a_policy_without_its_keys_is_refused():
    with pytest.raises(ValueError) as error:
        ExitPolicy.from_dict({"thresholds": [0.5]})
    assert "but criterion, temperatures is missing from ['thresholds']." in str(error.value)
