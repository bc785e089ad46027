"""Calibration: from the logits of all exits on held-out images to an exit policy.

Everything runs on :class:`Evidence`, a score and a bit per image and exit, so that neither memory nor time grows with
images times classes after one pass over the logits and a few to fit the temperatures.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.criteria import get_criterion
from ..models.exit_policy import ExitPolicy
from .budgets import find_frontier
from .decisions import Decisions, decisions_of, labelled_images
from .risk_control import certify
from .search import Evidence, frontier, optimise
from .temperature import CHUNK, chunks, fit_temperature


def calibrate(
    exit_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None,
    costs: Sequence[float],
    *,
    target_cost: float | None = None,
    max_accuracy_drop: float | None = None,
    max_risk: float | None = None,
    delta: float = 0.05,
    criterion: str = "confidence",
) -> ExitPolicy:
    """Find the thresholds that satisfy one constraint best.

    Every exit gets the temperature that minimises its label loss (Guo et al., ICML 2017,
    https://arxiv.org/abs/1706.04599). ``target_cost`` and ``max_accuracy_drop`` hold on the given images. ``max_risk``
    is a guarantee for finite samples and any distribution: on images drawn like the given ones, the risk of the policy
    is at most ``max_risk`` with probability ``1 - delta`` over the draw of the calibration images. It is found by
    learn then test (Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052): a third of the images proposes
    policies of decreasing cost, the rest tests them in that order until one fails, see
    :func:`~hf_selfkd.calibration.certify`. It does not extend to data from another distribution.

    If no thresholds satisfy the constraint, there is a warning and every image runs to the final exit.

    The policy also stores the best thresholds for other mean costs, which :meth:`ExitPolicy.at` chooses among, and how
    many images exited at each exit, which :class:`~hf_selfkd.deploy.ExitCounter` compares with.

    Multi-label models need a criterion on sigmoid outputs, ``min_confidence`` or ``mean_confidence``. Accuracy is then
    the share of images all of whose known labels are predicted correctly.

    Args:
        exit_logits: ``(exits, images, classes)``, a tensor or array, first to last, or a sequence of
            ``(images, classes)``; memory-mapped arrays are read in chunks.
        labels: As for training: class indices ``(images,)`` or probabilities ``(images, classes)``, whose largest is
            the label; of multi-label models 0 or 1 for every class and -100 where unknown, ``(images, classes)``.
            Images without a label are left out. ``None`` compares with the predictions of the final exit.
        costs: Cost of an image that exits at each exit, in any unit: multiply-adds from :func:`exit_costs`, or
            milliseconds from :func:`~hf_selfkd.evaluation.exit_latencies`.
        target_cost: Largest mean cost, as a share of the final exit's, in (0, 1]; finds the best accuracy.
        max_accuracy_drop: Largest loss of accuracy against the final exit, in [0, 1]; finds the least cost.
        max_risk: The same as a guarantee, in (0, 1): accuracy of the final exit minus that of the policy or, without
            labels, the share of images with another prediction than that of the final exit.
        delta: Probability with which the guarantee may fail, in (0, 1).
        criterion: Name of the score that the policy uses, see :class:`ExitPolicy`.

    Raises:
        ValueError: If not exactly one constraint is given, one is out of range, the criterion is unknown, or shapes
            do not fit.
    """
    given = {"target_cost": target_cost, "max_accuracy_drop": max_accuracy_drop, "max_risk": max_risk}
    constraint = {name: value for name, value in given.items() if value is not None}
    _check_constraint(constraint, costs, delta)
    _check_shapes(exit_logits, costs)
    labels, rows = labelled_images(labels, exit_logits, criterion)
    if max_risk is None:
        policy = fit_policy(exit_logits, labels, criterion, rows=rows)
        evidence = gather_evidence(exit_logits, labels, costs, policy, rows=rows)
        policy = _with_frontier(solve(policy, evidence, **constraint), evidence)
    else:
        constraint["delta"] = delta
        policy = _guarantee(exit_logits, labels, costs, criterion, constraint, rows)
    if target_cost is None and not any(map(policy.is_reachable, range(policy.num_exits - 1))):
        words = ", ".join(f"{name}={value}" for name, value in constraint.items())
        warnings.warn(f"No thresholds satisfy {words} on {len(rows)} images; early exit is disabled.", stacklevel=2)
    reference = "deepest exit" if labels is None else "labels"  # as saved policies name the final exit
    return replace(policy, calibration=policy.calibration | {"reference": reference})


def _guarantee(
    exit_logits: Any, labels: Any, costs: Sequence[float], criterion: str, constraint: dict, rows: Tensor
) -> ExitPolicy:
    """Propose policies on a third of the images, and test them on the others."""
    num_images, max_risk = len(rows), constraint["max_risk"]
    in_random_order = rows[torch.randperm(num_images, generator=torch.Generator().manual_seed(0))]
    proposing = in_random_order[: num_images // 3].sort().values
    testing = in_random_order[num_images // 3 :].sort().values
    policy = fit_policy(exit_logits, labels, criterion, rows=proposing)
    proposal = gather_evidence(exit_logits, labels, costs, policy, rows=proposing)
    test = gather_evidence(exit_logits, labels, costs, policy, rows=testing)
    candidates = frontier(proposal, max_risk)
    thresholds = certify(candidates, proposal, test, max_risk, constraint["delta"], signed=labels is not None)
    return _with_frontier(_with_thresholds(policy, thresholds, test, constraint, num_images), test)


def fit_policy(
    exit_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None,
    criterion: str = "confidence",
    *,
    rows: Tensor | None = None,
) -> ExitPolicy:
    """Fit the temperature of every exit, with a few passes over its logits.

    Without labels the final exit keeps temperature 1: with its own predictions as labels, the best temperature would
    be 0.

    Args:
        exit_logits: As for :func:`calibrate`.
        labels: As for :func:`calibrate`.
        criterion: As for :func:`calibrate`.
        rows: Indices of the images to use; ``None`` for all.

    Returns:
        A policy with these temperatures, by which no image exits early.

    Raises:
        ValueError: If the criterion is unknown.
    """
    never = get_criterion(criterion).never(len(exit_logits))
    rows = torch.arange(len(exit_logits[0])) if rows is None else rows
    decisions = decisions_of(criterion)
    targets = _targets(exit_logits, labels, rows, decisions)
    fitted = exit_logits[: len(exit_logits) - 1] if labels is None else exit_logits
    temperatures = [fit_temperature(logits, targets, rows, decisions.derivatives) for logits in fitted]
    temperatures += [1.0] * (len(exit_logits) - len(temperatures))
    thresholds = [never] * (len(exit_logits) - 1)
    return ExitPolicy(criterion=criterion, thresholds=thresholds, temperatures=temperatures)


def gather_evidence(
    exit_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None,
    costs: Sequence[float],
    policy: ExitPolicy,
    *,
    rows: Tensor | None = None,
) -> Evidence:
    """Reduce logits to scores and correctness, exit by exit, with one pass over them.

    Args:
        exit_logits: As for :func:`calibrate`.
        labels: As for :func:`calibrate`.
        costs: As for :func:`calibrate`.
        policy: The policy whose criterion and temperatures give the scores; its thresholds have no effect.
        rows: Indices of the images to use; ``None`` for all.

    Raises:
        ValueError: If logits are NaN.
    """
    rows = torch.arange(len(exit_logits[0])) if rows is None else rows
    targets = _targets(exit_logits, labels, rows, decisions_of(policy.criterion))
    scores, correct, history = [], [], None
    for exit, logits in enumerate(exit_logits):
        exit_scores, is_correct, history = _score(policy, exit, logits, targets, rows, history)
        if exit_scores.isnan().any():
            raise ValueError(f"exit_logits of exit {exit} contain NaN, so its predictions cannot be scored.")
        scores.append(exit_scores)
        correct.append(is_correct.double())
    shares = torch.tensor([float(cost) for cost in costs], dtype=torch.float64)
    never = get_criterion(policy.criterion).never(len(exit_logits))
    return Evidence(torch.stack(scores)[:-1], torch.stack(correct), shares / shares[-1], never)


def _targets(exit_logits: Any, labels: Any, rows: Tensor, decisions: Decisions) -> Tensor:
    """Return what to compare with, rows first: labels, or predictions of the final exit."""
    if labels is None:
        # Filled in place: small results kept between the large chunks would fragment the heap, by hundreds of
        # megabytes.
        shape = decisions.predict(next(chunks(exit_logits[-1], rows[:1]))).shape
        predictions = torch.empty(len(rows), *shape[1:], dtype=torch.long)
        for part, chunk in zip(predictions.split(CHUNK), chunks(exit_logits[-1], rows), strict=True):
            part.copy_(decisions.predict(chunk))
        return predictions
    return torch.as_tensor(labels).cpu().long()[rows]


def _score(
    policy: ExitPolicy, exit: int, logits: Any, targets: Tensor, rows: Tensor, history: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return scores of one exit and whether its predictions are correct, both ``(rows,)``, and the next history."""
    decisions = decisions_of(policy.criterion)
    scores, is_correct = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
    new_history = None
    for part, chunk in zip(torch.arange(len(rows)).split(CHUNK), chunks(logits, rows), strict=True):
        past = None if history is None else history[..., part]
        scores[part], _, chunk_history = policy.score(exit, chunk, past)
        is_correct[part] = decisions.is_correct(decisions.predict(chunk), targets[part])
        if chunk_history is not None:
            if new_history is None:
                new_history = chunk_history.new_empty(*chunk_history.shape[:-1], len(rows))
            new_history[..., part] = chunk_history
    return scores, is_correct, new_history


def solve(
    policy: ExitPolicy,
    evidence: Evidence,
    *,
    target_cost: float | None = None,
    max_accuracy_drop: float | None = None,
) -> ExitPolicy:
    """Find the thresholds for a target cost or an accuracy drop on evidence gathered before.

    Args:
        policy: The policy that the evidence was gathered with.
        evidence: The images.
        target_cost: As for :func:`calibrate`.
        max_accuracy_drop: As for :func:`calibrate`; exactly one of the two.

    Returns:
        The policy with its thresholds; those by which no image exits early if none satisfy the constraint.

    Raises:
        ValueError: If ``target_cost`` is below the cost of every exit.
    """
    if target_cost is not None:
        if target_cost < evidence.costs.min():
            raise ValueError(
                f"target_cost={target_cost} is below the share {evidence.costs.min():.4g} of the full cost that the "
                "cheapest exit needs."
            )
        thresholds = optimise(evidence, max_cost=target_cost)
        constraint = {"target_cost": target_cost}
    else:
        thresholds = optimise(evidence, min_accuracy=evidence.correct[-1].mean().item() - max_accuracy_drop)
        constraint = {"max_accuracy_drop": max_accuracy_drop}
    return _with_thresholds(policy, thresholds, evidence, constraint, evidence.scores.shape[1])


def _with_thresholds(
    policy: ExitPolicy, thresholds: list[float] | None, evidence: Evidence, constraint: dict[str, float], samples: int
) -> ExitPolicy:
    """Put thresholds into a policy, ``None`` for those that no score reaches, and record how they were found."""
    if thresholds is None:
        thresholds = [evidence.never] * len(evidence.scores)
    accuracy, cost = evidence.measure(thresholds)
    record = {
        "demand": constraint,  # the name that saved configurations use
        "samples": samples,
        "expected_cost": cost,
        "expected_accuracy": accuracy,
        "full_accuracy": evidence.correct[-1].mean().item(),
        "exit_counts": torch.bincount(evidence.exit_index(thresholds), minlength=len(evidence.correct)).tolist(),
    }
    return replace(policy, thresholds=thresholds, calibration=record)


def _with_frontier(policy: ExitPolicy, evidence: Evidence) -> ExitPolicy:
    """Store the best thresholds for other costs, which :meth:`ExitPolicy.at` chooses among."""
    frontier = find_frontier(evidence, list(policy.thresholds))
    return replace(policy, calibration=policy.calibration | {"frontier": frontier})


def _check_constraint(constraint: dict[str, float], costs: Sequence[float], delta: float) -> None:
    if len(constraint) != 1:
        raise ValueError(
            "calibrate needs exactly one of target_cost, max_accuracy_drop and max_risk, but got "
            f"{', '.join(constraint) or 'none'}."
        )
    ((name, value),) = constraint.items()
    ranges = {
        "target_cost": ("0 < target_cost <= 1", 0 < value <= 1),
        "max_accuracy_drop": ("0 <= max_accuracy_drop <= 1", 0 <= value <= 1),
        "max_risk": ("0 < max_risk < 1", 0 < value < 1),
    }
    wanted, is_valid = ranges[name]
    if not is_valid:
        raise ValueError(f"calibrate needs {wanted}, but got {name}={value!r}.")
    if not 0 < delta < 1:
        raise ValueError(f"calibrate needs 0 < delta < 1, but got delta={delta!r}.")
    if not all(math.isfinite(cost) and cost > 0 for cost in costs):
        raise ValueError(f"costs must be numbers above 0, but got {list(costs)!r}.")


def _check_shapes(exit_logits: Any, costs: Sequence[float]) -> None:
    shapes = [tuple(logits.shape) for logits in exit_logits]
    if len(shapes) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(
            "exit_logits must be shaped (exits, images, classes) with two exits or more, but its exits are shaped "
            f"{shapes}."
        )
    if len(costs) != len(shapes):
        raise ValueError(f"costs must hold one cost per exit, {len(shapes)} in all, but got {len(costs)}.")
