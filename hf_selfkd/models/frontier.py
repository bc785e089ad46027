"""The frontier of a calibrated policy: the best thresholds for many mean costs, among which ``ExitPolicy.at`` chooses.

It is stored as plain lists in ``ExitPolicy.calibration["frontier"]``: ``costs`` of the exits as shares of the final
exit's, and of every point its ``thresholds``, its ``exit_counts``, the calibration images that exit at each exit, and
its ``correct`` predictions. Mean cost and accuracy follow from the counts, so they are not stored.
"""

from typing import Any


def best_point(calibration: dict[str, Any] | None, target_cost: float) -> tuple[list[float], dict[str, Any]]:
    """Return the thresholds with the best accuracy at no more than a mean cost, and their record of calibration.

    Args:
        calibration: ``ExitPolicy.calibration``.
        target_cost: Largest mean cost, as a share of the final exit's, in (0, 1].

    Raises:
        ValueError: If there is no frontier, it cannot be read, or it has no point that is so cheap.
    """
    if isinstance(target_cost, bool) or not isinstance(target_cost, (int, float)) or not 0 < target_cost <= 1:
        raise ValueError(f"ExitPolicy.at needs 0 < target_cost <= 1, but got target_cost={target_cost!r}.")
    points = _points(calibration or {})
    within = [point for point in points if point["expected_cost"] <= target_cost + 1e-9]  # up to rounding
    if not within:
        cheapest = min(point["expected_cost"] for point in points)
        raise ValueError(
            f"target_cost={target_cost} is below the share {cheapest:.4g} of the full cost that the cheapest point of "
            "the frontier needs."
        )
    best = max(within, key=lambda point: (point["expected_accuracy"], -point["expected_cost"]))
    return best.pop("thresholds"), calibration | best | {"demand": {"target_cost": target_cost}}


def _points(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    if not calibration.get("frontier"):
        raise ValueError(
            "The policy has no frontier: it was not found by calibrate, or by a version that stored none. Calibrate "
            "it again."
        )
    frontier = calibration["frontier"]
    try:
        columns = (frontier["thresholds"], frontier["exit_counts"], frontier["correct"])
        return [
            {
                "thresholds": thresholds,
                "samples": sum(counts),
                "expected_cost": sum(map(float.__mul__, map(float, counts), frontier["costs"])) / sum(counts),
                "expected_accuracy": correct / sum(counts),
                "exit_counts": counts,
            }
            for thresholds, counts, correct in zip(*columns, strict=True)
        ]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"The policy has a frontier that cannot be read ({error!r}). Calibrate it again.") from error
