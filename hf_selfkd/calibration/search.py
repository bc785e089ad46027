"""Search for the thresholds of an exit policy, on one score and one bit per image and exit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Exits whose thresholds are searched together, every combination of so many for each.
WINDOW, LEVELS = 3, 33


@dataclass(frozen=True)
class Evidence:
    """What the search knows of calibration images.

    Args:
        scores: ``(auxiliary exits, images)``, float32, larger where more certain.
        correct: ``(exits, images)``, float64, 1 where an exit is right and 0 where it is wrong.
        costs: ``(exits,)``, float64, as shares of the deepest exit's.
        never: A threshold that no score reaches.
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
        # thresholds[exit, n] lets the n surest images leave: nobody, ..., everybody. Where two images have the same
        # score no threshold separates them.
        thresholds = torch.cat([end * self.never, torch.where(middle > below, middle, above), end * 0], dim=1)
        separates = torch.cat([end > 0, above > below, end > 0], dim=1)
        for name, value in {"order": order, "thresholds": thresholds, "separates": separates}.items():
            object.__setattr__(self, name, value)

    def leaves(self, thresholds: list[float]) -> Tensor:
        """Tell which images reach which threshold, ``(auxiliary exits, images)``."""
        return self.scores >= torch.tensor(thresholds).unsqueeze(1)

    def separable(self, exit: int, ranks: Tensor) -> Tensor:
        """Return the largest numbers of leaving images, none above ``ranks``, that a threshold can separate."""
        positions = torch.arange(self.separates.shape[1])
        return torch.where(self.separates[exit], positions, 0).cummax(0).values[ranks]

    def exit_index(self, thresholds: list[float]) -> Tensor:
        """Return the exit of each image, ``(images,)``."""
        return self.next_exit(self.leaves(thresholds), 0)

    def next_exit(self, leaves: Tensor, start: int) -> Tensor:
        """Return where each image leaves that has come as far as exit ``start``, ``(images,)``."""
        exit_index = torch.full(self.correct.shape[1:], len(self.correct) - 1)
        for exit in reversed(range(start, len(leaves))):
            exit_index = torch.where(leaves[exit], exit, exit_index)
        return exit_index

    def measure(self, thresholds: list[float]) -> tuple[float, float]:
        """Return mean accuracy and mean cost of a policy."""
        exit_index = self.exit_index(thresholds)
        accuracy = self.correct.gather(0, exit_index.unsqueeze(0)).mean()
        return accuracy.item(), self.costs[exit_index].mean().item()

    def trade_off(self, thresholds: list[float], exit: int) -> tuple[Tensor, Tensor]:
        """Return accuracy and cost, each ``(images + 1,)``, if the 0, 1, ... surest images may leave at one exit.

        The other exits keep their thresholds. Images that have left before do not count.
        """
        leaves = self.leaves(thresholds)
        comes = ~leaves[:exit].any(dim=0)
        otherwise = self.next_exit(leaves, exit + 1)
        stay_accuracy, stay_cost = self.measure(thresholds[:exit] + [self.never] + thresholds[exit + 1 :])
        gain = self.correct[exit] - self.correct.gather(0, otherwise.unsqueeze(0)).squeeze(0)
        saving = self.costs[exit] - self.costs[otherwise]
        num_images = self.scores.shape[1]
        curves = []
        for base, change in ((stay_accuracy, gain), (stay_cost, saving)):
            change = (change * comes)[self.order[exit]].cumsum(0) / num_images
            curves.append(torch.cat([torch.zeros(1, dtype=change.dtype), change]) + base)
        return curves[0], curves[1]


# Maps accuracies and costs of policies to what is to be maximised; minus infinity is not allowed.
Objective = Callable[[Tensor, Tensor], Tensor]


def ascend(evidence: Evidence, thresholds: list[float], objective: Objective) -> list[float]:
    """Improve one threshold after the other, each to its optimum given the others, until none moves."""
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


def combinations(
    evidence: Evidence, thresholds: list[float], first: int, ranks: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return accuracy and cost of every combination of thresholds of neighbouring exits, the others staying.

    Images are counted by how many of an exit's thresholds they reach; cumulative sums of these counts give all
    combinations at once.

    Args:
        evidence: The images.
        thresholds: One per auxiliary exit.
        first: The first exit whose threshold varies.
        ranks: For each exit that varies, how many of the surest images may leave there, descending certainty.

    Returns:
        Two tensors with one axis per exit that varies.
    """
    leaves = evidence.leaves(thresholds)
    comes = ~leaves[:first].any(dim=0)
    count = len(ranks)
    before = evidence.next_exit(leaves, 0)[~comes]
    exits = [torch.full((int(comes.sum()),), exit) for exit in range(first, first + count)]
    exits.append(evidence.next_exit(leaves, first + count)[comes])
    cells = torch.zeros_like(exits[-1])
    for exit, rank in enumerate(ranks, start=first):
        levels = evidence.thresholds[exit, rank].flip(0)  # ascending
        unreached = len(rank) - torch.bucketize(evidence.scores[exit, comes], levels, right=True)
        cells = cells * (len(rank) + 1) + unreached
    shape = [len(rank) + 1 for rank in ranks]

    def total(values: Tensor, gone: Tensor) -> Tensor:
        sums = gone.sum()
        for position, weights in enumerate(values):
            counts = torch.bincount(cells, weights=weights, minlength=math.prod(shape)).reshape(shape)
            for axis in range(count):
                # An image leaves at rank r if it reaches that threshold, so if fewer than r + 1 are unreached.
                reached = counts.cumsum(axis).narrow(axis, 0, shape[axis] - 1)
                whole = counts.sum(axis, keepdim=True)
                counts = reached if axis == position else whole - reached if axis < position else whole
            sums = sums + counts
        return sums / evidence.scores.shape[1]

    correct, here = evidence.correct[:, comes], torch.stack(exits)
    accuracy = total(correct.gather(0, here), evidence.correct[:, ~comes].gather(0, before.unsqueeze(0)))
    return accuracy, total(evidence.costs[here], evidence.costs[before])


def search(evidence: Evidence, objective: Objective) -> list[float]:
    """Find good thresholds: all combinations of coarse levels for up to three exits together, then finer ones.

    With more exits, windows of three neighbours take turns until none improves. Single thresholds end exactly.
    """
    num_early = len(evidence.scores)
    thresholds, best = [evidence.never] * num_early, -math.inf
    while True:
        for first in range(max(1, num_early - WINDOW + 1)):
            thresholds = _zoom(evidence, thresholds, range(first, min(first + WINDOW, num_early)), objective)
        thresholds = ascend(evidence, thresholds, objective)
        value = _value(evidence, thresholds, objective)
        if value <= best + 1e-12:
            return thresholds
        best = value


def _zoom(evidence: Evidence, thresholds: list[float], window: range, objective: Objective) -> list[float]:
    """Search the thresholds of a window of exits on a grid, then on ever finer grids around the best."""
    num_images = evidence.scores.shape[1]
    best, best_value = thresholds, _value(evidence, thresholds, objective)
    low, high = torch.zeros(len(window)), torch.full((len(window),), float(num_images))
    while True:
        ranks = [
            evidence.separable(exit, torch.linspace(start, end, LEVELS).round().long())
            for exit, start, end in zip(window, low.tolist(), high.tolist(), strict=True)
        ]
        values = objective(*combinations(evidence, thresholds, window[0], ranks))
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


def _value(evidence: Evidence, thresholds: list[float], objective: Objective) -> float:
    accuracy, cost = evidence.measure(thresholds)
    return objective(*torch.tensor([accuracy, cost], dtype=torch.float64)).item()


def optimise(
    evidence: Evidence, *, max_cost: float | None = None, min_accuracy: float | None = None
) -> list[float] | None:
    """Find the best accuracy at no more than a cost, or the least cost at no less than an accuracy.

    Returns:
        The thresholds, ``None`` if no policy that lets an image leave early meets the demand.
    """

    def objective(accuracy: Tensor, cost: Tensor) -> Tensor:
        # The other quantity breaks ties: it weighs less than one image among a million does.
        if max_cost is not None:
            return (accuracy - 1e-9 * cost).masked_fill(cost > max_cost + 1e-12, -math.inf)
        return (1e-9 * accuracy - cost).masked_fill(accuracy < min_accuracy - 1e-12, -math.inf)

    best = search(evidence, objective)
    return best if evidence.leaves(best).any() else None


def frontier(evidence: Evidence, max_risk: float, num_prices: int = 80) -> list[list[float]]:
    """List policies of ever less compute, as far as they lose ``max_risk`` of accuracy against the deepest exit.

    There are two kinds: those of most accuracy for their cost, which change many answers for better and worse, and
    those that spoil the fewest answers for their cost, which change few.
    """
    lost = (evidence.correct[-1] - evidence.correct).clamp(min=0)
    never = [evidence.never] * len(evidence.scores)
    levels = torch.linspace(0, evidence.scores.shape[1], LEVELS).round().long()
    ranks = [evidence.separable(exit, levels) for exit in range(min(WINDOW, len(evidence.scores)))]
    found = []
    for view in (evidence, replace(evidence, correct=1 - lost)):
        accuracies, costs = combinations(view, never, 0, ranks)
        policy = never
        for price in torch.logspace(-5, 1, num_prices).tolist():

            def worth(accuracy: Tensor, cost: Tensor, price=price) -> Tensor:
                return accuracy - price * cost

            places = torch.unravel_index(worth(accuracies, costs).argmax(), accuracies.shape)
            coarse = [view.thresholds[exit, ranks[exit][place]].item() for exit, place in enumerate(places)]
            starts = [policy, coarse + never[len(coarse) :]]
            policy = ascend(view, max(starts, key=lambda start: _value(view, start, worth)), worth)
            if view.correct[-1].mean() - view.measure(policy)[0] > max_risk:
                break
            found.append(policy)
    return [list(policy) for policy in dict.fromkeys(tuple(policy) for policy in found)]
