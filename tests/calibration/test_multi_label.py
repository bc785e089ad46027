"""Calibration of multi-label models, whose predictions are sets of labels."""

import pytest
import torch

from hf_selfkd import calibrate
from hf_selfkd.functional import binary_cross_entropy

COSTS = [0.3, 0.6, 1.0]
of_sigmoids = pytest.mark.parametrize("criterion", ["min_confidence", "mean_confidence"])


@pytest.fixture(scope="module")
def held_out():
    """Return over-confident logits of three exits of growing skill, and labels, some of them unknown."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(600, 4, generator=generator) > 0.6).long()
    noise = torch.randn(600, 1, generator=generator).exp() * torch.randn(600, 4, generator=generator)
    exit_logits = torch.stack([3 * (skill * (2 * labels - 1) + noise) for skill in (1.0, 1.5, 2.5)])
    labels[torch.rand(600, 4, generator=generator) < 0.1] = -100
    known = (labels != -100).any(dim=1)
    return exit_logits[:, known], labels[known]


@of_sigmoids
def test_a_budget_is_kept_at_the_best_share_of_exact_matches(held_out, criterion):
    exit_logits, labels = held_out
    policy = calibrate(exit_logits, labels, COSTS, target_cost=0.6, criterion=criterion)
    assert policy.criterion == criterion

    def judge(exit_index, logits):
        exact = (((logits > 0) == (labels == 1)) | (labels == -100)).all(dim=1)
        return exact.double().mean().item(), torch.tensor(COSTS)[exit_index].mean().item()

    accuracy, cost = judge(*policy.decide(exit_logits))
    assert accuracy == pytest.approx(policy.calibration["expected_accuracy"]) and cost <= 0.6 + 1e-6
    assert policy.calibration["full_accuracy"] == pytest.approx(judge(torch.tensor([2]), exit_logits[2])[0])
    draws = torch.randint(3, (200, labels.shape[0]), generator=torch.Generator().manual_seed(1))
    blind = [judge(draw, exit_logits[draw, torch.arange(len(labels))]) for draw in draws]
    assert accuracy > max(exact for exact, cost in blind if cost < 0.65) + 0.02  # better than exits by chance


def test_temperatures_minimise_the_binary_cross_entropy(held_out):
    exit_logits, labels = held_out
    policy = calibrate(exit_logits, labels, COSTS, target_cost=0.6, criterion="min_confidence")
    for logits, temperature in zip(exit_logits, policy.temperatures, strict=True):
        assert 1 < temperature < 20
        best = binary_cross_entropy(logits / temperature, labels)
        assert all(best < binary_cross_entropy(logits / (factor * temperature), labels) for factor in (0.95, 1.05))


def test_without_labels_the_final_exit_is_the_reference(held_out):
    exit_logits, _ = held_out
    policy = calibrate(exit_logits, None, COSTS, max_accuracy_drop=0.05, criterion="min_confidence")
    exit_index, logits = policy.decide(exit_logits)
    agreement = ((logits > 0) == (exit_logits[2] > 0)).all(dim=1).double().mean().item()
    assert agreement == pytest.approx(policy.calibration["expected_accuracy"])
    assert agreement >= 0.95 and exit_index.min() < 2 and policy.temperatures[2] == 1


def test_a_guarantee_is_for_exact_matches(held_out):
    exit_logits, labels = held_out
    policy = calibrate(exit_logits, labels, COSTS, max_risk=0.3, criterion="min_confidence")
    assert policy.calibration["expected_cost"] < 1


def test_images_without_a_known_label_are_left_out(held_out):
    exit_logits, labels = held_out
    unlabelled = labels.index_fill(0, torch.arange(50), -100)
    policy = calibrate(exit_logits, unlabelled, COSTS, target_cost=0.6, criterion="min_confidence")
    same = calibrate(exit_logits[:, 50:], labels[50:].double(), COSTS, target_cost=0.6, criterion="min_confidence")
    assert policy == same and policy.calibration["samples"] == len(labels) - 50


@pytest.mark.parametrize(
    ("change", "criterion", "words"),
    [
        (lambda labels: labels, "confidence", 'The calibration data has .* criterion="min_confidence"'),
        (lambda labels: labels[:, 0], "min_confidence", "has the label .* a vector of 4 values, one for every class"),
        (lambda labels: labels.clamp(min=-1), "mean_confidence", "has -1 in its label, .* or -100 where unknown"),
        (lambda labels: labels[:-1], "mean_confidence", "labels must hold one label per image"),
        (
            lambda labels: torch.full_like(labels, -100),
            "min_confidence",
            "three images or more with a label",
        ),
        (lambda labels: labels, "min_confidense", "Unknown criterion 'min_confidense'. Did you mean 'min_confidence'"),
    ],
)
def test_labels_that_do_not_fit_the_criterion_are_refused(held_out, change, criterion, words):
    exit_logits, labels = held_out
    with pytest.raises(ValueError, match=words):
        calibrate(exit_logits, change(labels), COSTS, target_cost=0.6, criterion=criterion)
