"""The best policies for many mean costs at once: the frontier that ``ExitPolicy.at`` moves along."""

import math
from typing import Any

import torch

from .search import LEVELS, WINDOW, Evidence, ascend, grid_trade_off, value_of, within_cost

# The frontier has a policy for the cheapest exit's cost and for every multiple of this share up to the full cost.
STEP = 0.025


def find_frontier(evidence: Evidence, known: list[float]) -> dict[str, Any]:
    """Find the policies with the best accuracy for their cost, as :mod:`~hf_selfkd.models.frontier` describes them.

    Starts from all combinations of coarse thresholds and from the next cheaper policy, then optimises each threshold
    given the others; a joint search for every cost would take as many times as long as :func:`calibrate`.

    Args:
        evidence: The calibration images.
        known: Thresholds of a policy that was searched for jointly, which becomes a point unless another is better.
    """
    candidates = [*_best_within_budgets(evidence), known]
    counted = sorted((_counted(evidence, thresholds) for thresholds in candidates), key=lambda point: point["cost"])
    kept: list[dict[str, Any]] = []
    for point in counted:
        if not kept or point["correct"] > kept[-1]["correct"]:
            if kept and point["cost"] == kept[-1]["cost"]:
                kept.pop()
            kept.append(point)
    columns = {name: [point[name] for point in kept] for name in ("thresholds", "exit_counts", "correct")}
    return {"costs": evidence.costs.tolist()} | columns


def _best_within_budgets(evidence: Evidence) -> list[list[float]]:
    """Return thresholds for every budget, in ascending order."""
    never = [evidence.never] * len(evidence.scores)
    levels = torch.linspace(0, evidence.scores.shape[1], LEVELS).round().long()
    ranks = [evidence.separable(exit, levels) for exit in range(min(WINDOW, len(never)))]
    accuracies, costs = grid_trade_off(evidence, never, 0, ranks)
    cheapest = int(evidence.costs.argmin())
    policy = [0.0 if exit == cheapest else evidence.never for exit in range(len(never))]
    found, least = [policy], evidence.costs[cheapest].item()
    for budget in (STEP * step for step in range(math.ceil(least / STEP), round(1 / STEP) + 1)):
        objective = within_cost(budget)
        places = torch.unravel_index(objective(accuracies, costs).argmax(), accuracies.shape)
        coarse = [evidence.thresholds[exit, ranks[exit][place]].item() for exit, place in enumerate(places)]
        starts = [policy, coarse + never[len(coarse) :]]
        policy = ascend(evidence, max(starts, key=lambda start: value_of(evidence, start, objective)), objective)
        found.append(policy)
    return found


def _counted(evidence: Evidence, thresholds: list[float]) -> dict[str, Any]:
    exit_index = evidence.exit_index(thresholds)
    return {
        "thresholds": [float(f"{threshold:.9g}") for threshold in thresholds],  # enough digits for float32
        "exit_counts": torch.bincount(exit_index, minlength=len(evidence.correct)).tolist(),
        "correct": int(evidence.correct.gather(0, exit_index.unsqueeze(0)).sum()),
        "cost": evidence.costs[exit_index].mean().item(),
    }
