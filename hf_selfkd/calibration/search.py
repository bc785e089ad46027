"""Search for the thresholds of an exit policy, on one score and one bit per image and exit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Exits whose thresholds are searched jointly, and the levels of each on the grid of their combinations.
WINDOW, LEVELS = 3, 33


@dataclass(frozen=True)
class Evidence:
    """Scores and correctness of calibration images at every exit.

    Args:
        scores: ``(auxiliary exits, images)``, float32, larger where more certain.
        correct: ``(exits, images)``, float64, 1 where the prediction of an exit is correct and 0 where it is wrong.
        costs: ``(exits,)``, float64, as shares of the final exit's.
        never: A threshold that no score reaches.

    Attributes:
        order: ``(auxiliary exits, images)``, the images of each exit by descending score.
        thresholds: ``(auxiliary exits, images + 1)``; ``thresholds[exit, n]`` is reached by the ``n`` most confident
            images: by none, ..., by all.
        separates: Likewise, bool: false where two images have the same score, which no threshold separates.
    """

    scores: Tensor
    correct: Tensor
    costs: Tensor
    never: float

    def __post_init__(self):
        order = self.scores.argsort(dim=1, descending=True, stable=True)
        ranked = self.scores.gather(1, order)
        above, below = ranked[:, :-1], ranked[:, 1:]
        middle = ((above.double() + below.double()) / 2).float()
        end = torch.ones_like(ranked[:, :1])
        thresholds = torch.cat([end * self.never, torch.where(middle > below, middle, above), end * 0], dim=1)
        separates = torch.cat([end > 0, above > below, end > 0], dim=1)
        for name, value in {"order": order, "thresholds": thresholds, "separates": separates}.items():
            object.__setattr__(self, name, value)

    def reached(self, thresholds: list[float]) -> Tensor:
        """Return whether each score reaches the threshold of its exit, ``(auxiliary exits, images)``."""
        return self.scores >= torch.tensor(thresholds).unsqueeze(1)

    def separable(self, exit: int, ranks: Tensor) -> Tensor:
        """Return the largest numbers of images, none above ``ranks``, that a threshold separates from the others."""
        positions = torch.arange(self.separates.shape[1])
        return torch.where(self.separates[exit], positions, 0).cummax(0).values[ranks]

    def exit_index(self, thresholds: list[float]) -> Tensor:
        """Return the exit of each image, ``(images,)``."""
        return self.next_exit(self.reached(thresholds), 0)

    def next_exit(self, reached: Tensor, start: int) -> Tensor:
        """Return the exit of each image that gets as far as exit ``start``, ``(images,)``."""
        exit_index = torch.full(self.correct.shape[1:], len(self.correct) - 1)
        for exit in reversed(range(start, len(reached))):
            exit_index = torch.where(reached[exit], exit, exit_index)
        return exit_index

    def measure(self, thresholds: list[float]) -> tuple[float, float]:
        """Return mean accuracy and mean cost of a policy."""
        exit_index = self.exit_index(thresholds)
        accuracy = self.correct.gather(0, exit_index.unsqueeze(0)).mean()
        return accuracy.item(), self.costs[exit_index].mean().item()

    def trade_off(self, thresholds: list[float], exit: int) -> tuple[Tensor, Tensor]:
        """Return accuracy and cost, each ``(images + 1,)``, at all thresholds of one exit, the others fixed.

        Position ``n`` is the threshold that the ``n`` most confident images reach. Images that have exited before
        stay where they are.
        """
        reached = self.reached(thresholds)
        arrives = ~reached[:exit].any(dim=0)
        otherwise = self.next_exit(reached, exit + 1)
        stay_accuracy, stay_cost = self.measure(thresholds[:exit] + [self.never] + thresholds[exit + 1 :])
        gain = self.correct[exit] - self.correct.gather(0, otherwise.unsqueeze(0)).squeeze(0)
        saving = self.costs[exit] - self.costs[otherwise]
        num_images = self.scores.shape[1]
        curves = []
        for base, change in ((stay_accuracy, gain), (stay_cost, saving)):
            change = (change * arrives)[self.order[exit]].cumsum(0) / num_images
            curves.append(torch.cat([torch.zeros(1, dtype=change.dtype), change]) + base)
        return curves[0], curves[1]


# Maps accuracies and costs of policies to the value to maximise; minus infinity is not allowed.
Objective = Callable[[Tensor, Tensor], Tensor]


def ascend(evidence: Evidence, thresholds: list[float], objective: Objective) -> list[float]:
    """Improve one threshold after the other, each to its optimum given the others, until none changes."""
    thresholds = list(thresholds)
    best = None
    while True:
        for exit in range(len(thresholds)):
            values = objective(*evidence.trade_off(thresholds, exit))
            values = values.masked_fill(~evidence.separates[exit], -math.inf)
            position = values.argmax()
            thresholds[exit] = evidence.thresholds[exit, position].item()
        value = values[position].item()
        if best is not None and value <= best + 1e-12:
            return thresholds
        best = value


def grid_trade_off(
    evidence: Evidence, thresholds: list[float], first: int, ranks: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return accuracy and cost of every combination of thresholds of neighbouring exits, the others fixed.

    Images are sorted once into the cells of a histogram, by the number of thresholds of each exit that they miss.
    Cumulative sums over its axes then give every combination at once.

    Args:
        evidence: The images.
        thresholds: One per auxiliary exit.
        first: The first exit whose threshold varies.
        ranks: For each exit that varies, its thresholds as numbers of images that reach them, ascending.

    Returns:
        Two tensors with one axis per exit that varies.

    Example:
        Two exits before the final one, each with a threshold that no image reaches and one that the two most
        confident of three images reach. The first exit is correct on one of these two.

        >>> scores = torch.tensor([[0.9, 0.6, 0.2], [0.8, 0.7, 0.4]])
        >>> correct = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
        >>> evidence = Evidence(scores, correct, torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64), never=2.0)
        >>> levels = torch.tensor([0, 2])
        >>> accuracy, cost = grid_trade_off(evidence, [2.0, 2.0], 0, [levels, levels])
        >>> (3 * accuracy).tolist()  # correct images: rows are thresholds of exit 0, columns of exit 1
        [[3.0, 3.0], [2.0, 2.0]]
        >>> (3 * cost).tolist()
        [[3.0, 2.0], [1.5, 1.5]]
    """
    reached = evidence.reached(thresholds)
    arrives = ~reached[:first].any(dim=0)
    before = evidence.next_exit(reached, 0)[~arrives]
    after = evidence.next_exit(reached, first + len(ranks))[arrives]
    exits = torch.stack([*(torch.full_like(after, first + axis) for axis in range(len(ranks))), after])
    shape = [len(rank) + 1 for rank in ranks]
    cells = torch.zeros_like(after)
    for exit, rank in enumerate(ranks, start=first):
        levels = evidence.thresholds[exit, rank].flip(0)  # ascending
        missed = len(rank) - torch.bucketize(evidence.scores[exit, arrives], levels, right=True)
        cells = cells * (len(rank) + 1) + missed

    def mean(values: Tensor, exited: Tensor) -> Tensor:
        total = exited.sum()
        for position, weights in enumerate(values):
            histogram = torch.bincount(cells, weights=weights, minlength=math.prod(shape)).reshape(shape)
            total = total + _sum_exiting(histogram, position)
        return total / evidence.scores.shape[1]

    correct = evidence.correct[:, arrives].gather(0, exits)
    correct_before = evidence.correct[:, ~arrives].gather(0, before.unsqueeze(0))
    return mean(correct, correct_before), mean(evidence.costs[exits], evidence.costs[before])


def _sum_exiting(histogram: Tensor, position: int) -> Tensor:
    """Sum over the images that exit at the exit of axis ``position``, after all axes if there is none."""
    for earlier in range(min(position, histogram.dim())):
        histogram = _stay(histogram, earlier)
    if position < histogram.dim():
        histogram = _exit(histogram, position)
    for later in range(position + 1, histogram.dim()):
        histogram = _any(histogram, later)
    return histogram


def _exit(histogram: Tensor, axis: int) -> Tensor:
    """Sum over the images that reach each threshold of an exit: threshold ``r``, if they miss at most ``r``."""
    return histogram.cumsum(axis).narrow(axis, 0, histogram.shape[axis] - 1)


def _any(histogram: Tensor, axis: int) -> Tensor:
    """Sum over all images, whichever thresholds of an exit they reach."""
    return histogram.sum(axis, keepdim=True)


def _stay(histogram: Tensor, axis: int) -> Tensor:
    """Sum over the images that miss each threshold of an exit."""
    return _any(histogram, axis) - _exit(histogram, axis)


def search(evidence: Evidence, objective: Objective) -> list[float]:
    """Find good thresholds: all combinations of coarse levels for up to three exits jointly, then finer ones.

    With more exits, windows of three neighbours take turns until none improves. In the end each threshold is optimal
    given the others.
    """
    num_early = len(evidence.scores)
    thresholds, best = [evidence.never] * num_early, -math.inf
    while True:
        for first in range(max(1, num_early - WINDOW + 1)):
            thresholds = _zoom(evidence, thresholds, range(first, min(first + WINDOW, num_early)), objective)
        thresholds = ascend(evidence, thresholds, objective)
        value = value_of(evidence, thresholds, objective)
        if value <= best + 1e-12:
            return thresholds
        best = value


def _zoom(evidence: Evidence, thresholds: list[float], window: range, objective: Objective) -> list[float]:
    """Search the thresholds of a window of exits on a grid, then on ever finer grids around the best."""
    num_images = evidence.scores.shape[1]
    best, best_value = thresholds, value_of(evidence, thresholds, objective)
    low, high = torch.zeros(len(window)), torch.full((len(window),), float(num_images))
    while True:
        ranks = [
            evidence.separable(exit, torch.linspace(start, end, LEVELS).round().long())
            for exit, start, end in zip(window, low.tolist(), high.tolist(), strict=True)
        ]
        values = objective(*grid_trade_off(evidence, thresholds, window[0], ranks))
        places = torch.unravel_index(values.argmax(), values.shape)
        found = list(thresholds)
        for exit, rank, place in zip(window, ranks, places, strict=True):
            found[exit] = evidence.thresholds[exit, rank[place]].item()
        if values.max().item() > best_value:
            best, best_value = found, values.max().item()
        step = (high - low) / (LEVELS - 1)
        if step.max() <= 1:
            return best
        centre = torch.stack([rank[place] for rank, place in zip(ranks, places, strict=True)])
        low, high = (centre - step).clamp(min=0), (centre + step).clamp(max=num_images)


def value_of(evidence: Evidence, thresholds: list[float], objective: Objective) -> float:
    """Return the value of a policy; minus infinity if it is not allowed."""
    accuracy, cost = evidence.measure(thresholds)
    return objective(*torch.tensor([accuracy, cost], dtype=torch.float64)).item()


# In both objectives the other quantity breaks ties: it weighs less than one image in a million does.
def within_cost(max_cost: float) -> Objective:
    """Return the objective of the best accuracy at no more than a cost."""
    return lambda accuracy, cost: (accuracy - 1e-9 * cost).masked_fill(cost > max_cost + 1e-12, -math.inf)


def _above_accuracy(min_accuracy: float) -> Objective:
    """Return the objective of the least cost at no less than an accuracy."""
    return lambda accuracy, cost: (1e-9 * accuracy - cost).masked_fill(accuracy < min_accuracy - 1e-12, -math.inf)


def optimise(
    evidence: Evidence, *, max_cost: float | None = None, min_accuracy: float | None = None
) -> list[float] | None:
    """Find the best accuracy at no more than a cost, or the least cost at no less than an accuracy.

    Returns:
        The thresholds, ``None`` if no policy with early exits satisfies the constraint.
    """
    best = search(evidence, within_cost(max_cost) if max_cost is not None else _above_accuracy(min_accuracy))
    return best if evidence.reached(best).any() else None


def frontier(evidence: Evidence, max_risk: float, num_prices: int = 80) -> list[list[float]]:
    """List policies of decreasing cost, up to a loss of ``max_risk`` of accuracy against the final exit.

    There are two kinds: those with the best accuracy for their cost, which change many predictions for better and
    worse, and those that lose the fewest correct predictions for their cost, which change few.
    """
    lost = (evidence.correct[-1] - evidence.correct).clamp(min=0)
    never = [evidence.never] * len(evidence.scores)
    levels = torch.linspace(0, evidence.scores.shape[1], LEVELS).round().long()
    ranks = [evidence.separable(exit, levels) for exit in range(min(WINDOW, len(evidence.scores)))]
    found = []
    for view in (evidence, replace(evidence, correct=1 - lost)):
        accuracies, costs = grid_trade_off(view, never, 0, ranks)
        policy = never
        for price in torch.logspace(-5, 1, num_prices).tolist():

            def worth(accuracy: Tensor, cost: Tensor, price=price) -> Tensor:
                return accuracy - price * cost

            places = torch.unravel_index(worth(accuracies, costs).argmax(), accuracies.shape)
            coarse = [view.thresholds[exit, ranks[exit][place]].item() for exit, place in enumerate(places)]
            starts = [policy, coarse + never[len(coarse) :]]
            policy = ascend(view, max(starts, key=lambda start: value_of(view, start, worth)), worth)
            if view.correct[-1].mean() - view.measure(policy)[0] > max_risk:
                break
            found.append(policy)
    return [list(policy) for policy in dict.fromkeys(tuple(policy) for policy in found)]
