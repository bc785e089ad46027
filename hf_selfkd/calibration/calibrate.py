"""Calibration: the logits of all exits on held-out images in, an exit policy out.

Everything runs on what :class:`Evidence` keeps of the logits, a score and a bit per image and exit, so neither memory
nor time grows with images times classes after one pass over them.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.exit_policy import ExitPolicy
from .risk_control import certify
from .search import Evidence, frontier, optimise

# Images whose logits are in float32 at once: few enough to stay in a processor's cache.
CHUNK = 512

# Temperatures lie in [1 / TEMPERATURE_LIMIT, TEMPERATURE_LIMIT]: logits that separate the classes perfectly have no
# best one.
TEMPERATURE_LIMIT = 100.0


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
    """Find the thresholds that meet one demand best.

    Every exit gets the temperature that minimises its cross-entropy (Guo et al., ICML 2017,
    https://arxiv.org/abs/1706.04599). Budget and accuracy drop hold on the images given. ``max_risk`` is a guarantee
    with finite samples and for any distribution: for images drawn like the ones given, the risk of the policy is at
    most ``max_risk`` with probability ``1 - delta`` over the draw of the calibration images. It is found by learn then
    test (Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052): a third of the images proposes policies of ever
    less compute, the rest tests them in that order until one fails, see :func:`~hf_selfkd.calibration.certify`. It
    says nothing about data of another kind.

    Where no setting meets the demand there is a warning, and the policy lets nobody leave early.

    Args:
        exit_logits: ``(exits, images, classes)``, a tensor or array, shallow to deep, or a sequence of
            ``(images, classes)``; memory-mapped arrays are read piece by piece.
        labels: Class indices ``(images,)``; ``None`` judges early answers by those of the deepest exit.
        costs: Cost of an image that leaves at each exit, in any unit: multiply-adds from :func:`exit_costs`, or
            milliseconds from :func:`~hf_selfkd.evaluation.exit_latencies`.
        target_cost: Most the mean cost may be, as a share of the deepest exit's, in (0, 1]; finds the best accuracy.
        max_accuracy_drop: Most accuracy that may be lost against the deepest exit, in [0, 1]; finds the least cost.
        max_risk: The same as a guarantee, in (0, 1): accuracy of the deepest exit minus that of the early answers or,
            without labels, the share of images answered otherwise than by the deepest exit.
        delta: Probability with which the guarantee may fail, in (0, 1).
        criterion: What :class:`ExitPolicy` decides by.

    Raises:
        ValueError: If not exactly one demand is made, one is out of range, or shapes do not fit.
    """
    demand = {"target_cost": target_cost, "max_accuracy_drop": max_accuracy_drop, "max_risk": max_risk}
    demand = {name: value for name, value in demand.items() if value is not None}
    _check_demand(demand, costs, delta)
    num_images = _check_shapes(exit_logits, labels, costs)
    if max_risk is None:
        policy, evidence = gather_evidence(exit_logits, labels, costs, criterion)
        return _note_reference(solve(policy, evidence, **demand), labels)
    in_random_order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    proposing, testing = in_random_order[: num_images // 3], in_random_order[num_images // 3 :]
    policy, proposal = gather_evidence(exit_logits, labels, costs, criterion, rows=proposing)
    _, test = gather_evidence(exit_logits, labels, costs, criterion, rows=testing, policy=policy)
    thresholds = certify(frontier(proposal, max_risk), proposal, test, max_risk, delta, signed=labels is not None)
    return _note_reference(_finish(policy, thresholds, test, demand | {"delta": delta}, num_images), labels)


def _note_reference(policy: ExitPolicy, labels: Any) -> ExitPolicy:
    reference = "deepest exit" if labels is None else "labels"
    return replace(policy, calibration=policy.calibration | {"reference": reference})


def solve(
    policy: ExitPolicy,
    evidence: Evidence,
    *,
    target_cost: float | None = None,
    max_accuracy_drop: float | None = None,
) -> ExitPolicy:
    """Find the thresholds for a budget or an accuracy drop on evidence gathered before, see :func:`calibrate`."""
    if target_cost is not None:
        if target_cost < evidence.costs.min():
            raise ValueError(
                f"target_cost={target_cost} is below the share {evidence.costs.min():.4g} of the full cost that the "
                "cheapest exit needs."
            )
        thresholds = optimise(evidence, max_cost=target_cost)
        demand = {"target_cost": target_cost}
    else:
        thresholds = optimise(evidence, min_accuracy=evidence.correct[-1].mean().item() - max_accuracy_drop)
        demand = {"max_accuracy_drop": max_accuracy_drop}
    return _finish(policy, thresholds, evidence, demand, evidence.scores.shape[1])


def gather_evidence(
    exit_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None,
    costs: Sequence[float],
    criterion: str = "confidence",
    *,
    rows: Tensor | None = None,
    policy: ExitPolicy | None = None,
) -> tuple[ExitPolicy, Evidence]:
    """Reduce logits to what the search needs, exit by exit, with one pass to score and a few to find a temperature.

    Args:
        exit_logits: As for :func:`calibrate`.
        labels: As for :func:`calibrate`.
        costs: As for :func:`calibrate`.
        criterion: What the policy decides by.
        rows: The images to use, indices; ``None`` for all.
        policy: One whose criterion and temperatures to use; ``None`` finds temperatures on these images.

    Returns:
        A policy that lets nobody leave early, and the evidence.
    """
    rows = torch.arange(len(exit_logits[0])) if rows is None else rows.sort().values
    if labels is None:
        labels = torch.cat([chunk.argmax(dim=1) for chunk in _chunks(exit_logits[-1], rows)])
        judge_deepest = False
    else:
        labels = torch.as_tensor(labels).cpu().long()[rows]
        judge_deepest = True
    if policy is None:
        temperatures = [_fit_temperature(logits, labels, rows) for logits in exit_logits[: len(costs) - 1]]
        # Its own answers would make the deepest exit as sure as can be, so without labels it stays as it is.
        temperatures.append(_fit_temperature(exit_logits[-1], labels, rows) if judge_deepest else 1.0)
        never = float(len(costs)) if criterion == "patience" else 2.0
        policy = ExitPolicy(criterion=criterion, thresholds=[never] * (len(costs) - 1), temperatures=temperatures)
    scores, correct, history = [], [], None
    for exit, logits in enumerate(exit_logits):
        judged = [_judge(policy, exit, chunk, past) for chunk, past in _with_history(logits, rows, history)]
        exit_scores, answers, histories = zip(*judged, strict=True)
        history = None if histories[0] is None else torch.cat(histories, dim=1)
        scores.append(torch.cat(exit_scores))
        correct.append((torch.cat(answers) == labels).double())
        if scores[-1].isnan().any():
            raise ValueError(f"exit_logits of exit {exit} hold NaN, so its answers cannot be judged.")
    shares = torch.tensor([float(cost) for cost in costs], dtype=torch.float64)
    never = policy.thresholds[0] if policy.thresholds else 2.0
    return policy, Evidence(torch.stack(scores)[:-1], torch.stack(correct), shares / shares[-1], never)


def _judge(policy: ExitPolicy, exit: int, logits: Tensor, history: Tensor | None):
    scores, _, history = policy.score(exit, logits, history)
    return scores, logits.argmax(dim=1), history


def _with_history(logits: Any, rows: Tensor, history: Tensor | None):
    chunks = _chunks(logits, rows)
    pasts = [None] * math.ceil(len(rows) / CHUNK) if history is None else history.split(CHUNK, dim=1)
    return zip(chunks, pasts, strict=True)


def _chunks(logits: Any, rows: Tensor):
    """Yield float32 logits of some images, a few at a time; memory-mapped arrays stay where they are."""
    for part in rows.split(CHUNK):
        chunk = logits[part.to(logits.device)] if isinstance(logits, Tensor) else torch.as_tensor(logits[part.numpy()])
        yield chunk.detach().float().cpu()


def _fit_temperature(logits: Any, labels: Tensor, rows: Tensor) -> float:
    """Return the temperature of least cross-entropy, by Newton's method on its inverse, in which the loss is convex.

    The first images alone give a start from which two or three passes over all of them are enough.
    """
    inverse = 1.0
    for count in (4 * CHUNK, len(rows)):
        low, high = 1 / TEMPERATURE_LIMIT, TEMPERATURE_LIMIT
        for _ in range(30):
            slope, curvature = _slope(logits, labels[:count], rows[:count], inverse)
            low, high = (low, inverse) if slope > 0 else (inverse, high)
            step = inverse - slope / curvature if curvature > 0 else low
            step = step if low < step < high else math.sqrt(low * high)
            change, inverse = abs(step / inverse - 1), step
            if change < 1e-4:
                break
    return 1 / inverse


def _slope(logits: Any, labels: Tensor, rows: Tensor, inverse: float) -> tuple[float, float]:
    """Return the first and second derivative of the mean cross-entropy by the inverse temperature."""
    slope = curvature = 0.0
    for chunk, targets in zip(_chunks(logits, rows), labels.split(CHUNK), strict=True):
        chunk = chunk - chunk.amax(dim=1, keepdim=True)
        probabilities = (chunk * inverse).softmax(dim=1)
        mean = (probabilities * chunk).sum(dim=1)
        slope += (mean - chunk.gather(1, targets.unsqueeze(1)).squeeze(1)).sum(dtype=torch.float64).item()
        curvature += ((probabilities * chunk * chunk).sum(dim=1) - mean * mean).sum(dtype=torch.float64).item()
    return slope / len(rows), curvature / len(rows)


def _finish(
    policy: ExitPolicy, thresholds: list[float] | None, evidence: Evidence, demand: dict[str, float], samples: int
) -> ExitPolicy:
    """Put thresholds into the policy, and how they were found; nobody leaves early if there are none."""
    if thresholds is None:
        thresholds = list(policy.thresholds)
        if "target_cost" not in demand:
            words = ", ".join(f"{name}={value}" for name, value in demand.items())
            warnings.warn(
                f"No setting lets images leave early within {words} on {samples} images, so nobody will.", stacklevel=4
            )
    accuracy, cost = evidence.measure(thresholds)
    record = {
        "demand": demand,
        "samples": samples,
        "expected_cost": cost,
        "expected_accuracy": accuracy,
        "full_accuracy": evidence.correct[-1].mean().item(),
    }
    return replace(policy, thresholds=thresholds, calibration=record)


def _check_demand(demand: dict[str, float], costs: Sequence[float], delta: float) -> None:
    if len(demand) != 1:
        raise ValueError(
            "calibrate needs exactly one of target_cost, max_accuracy_drop and max_risk, but got "
            f"{', '.join(demand) or 'none'}."
        )
    ((name, value),) = demand.items()
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


def _check_shapes(exit_logits: Any, labels: Any, costs: Sequence[float]) -> int:
    shapes = [tuple(logits.shape) for logits in exit_logits]
    if len(shapes) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(
            "exit_logits must be shaped (exits, images, classes) with two exits or more, but its exits are shaped "
            f"{shapes}."
        )
    if len(costs) != len(shapes):
        raise ValueError(f"costs must name one cost per exit, {len(shapes)} of them, but got {len(costs)}.")
    num_images, num_classes = shapes[0]
    if num_images < 3:
        raise ValueError(f"Calibration needs three images or more, but got {num_images}.")
    if labels is not None:
        labels = torch.as_tensor(labels)
        if (
            labels.shape != (num_images,)
            or labels.is_floating_point()
            or not 0 <= labels.min() <= labels.max() < num_classes
        ):
            raise ValueError(
                f"labels must be {num_images} class indices from 0 to {num_classes - 1}, but got {labels.dtype} "
                f"labels shaped {tuple(labels.shape)}."
            )
    return num_images
