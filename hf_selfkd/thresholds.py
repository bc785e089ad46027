"""Search for the thresholds of an exit policy, on one score and one bit per image and exit."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Prices of compute, in accuracy per full cost, between which the best policy is bisected: at the first compute is
# free, at the last accuracy is.
PRICES = (1e-6, 1e4)


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
            values = values.masked_fill(~evidence.separates[exit], -torch.inf)
            position = values.argmax()
            thresholds[exit] = evidence.thresholds[exit, position].item()
        value = values[position].item()
        if best is not None and value <= best + 1e-12:
            return thresholds
        best = value


def optimise(
    evidence: Evidence, *, max_cost: float | None = None, min_accuracy: float | None = None
) -> list[float] | None:
    """Find the best accuracy at no more than a cost, or the least cost at no less than an accuracy.

    Bisects the price of compute: at a fixed price each threshold has an exact optimum given the others, and the price
    decides how the exits share the budget. What the best policies found so leave unspent is spent by moving single
    thresholds under the constraint itself.

    Returns:
        The thresholds, ``None`` if no policy that lets an image leave early meets the demand.
    """

    def constrained(accuracy: Tensor, cost: Tensor) -> Tensor:
        # The other quantity breaks ties: it weighs less than one image among a million does.
        if max_cost is not None:
            return (accuracy - 1e-9 * cost).masked_fill(cost > max_cost + 1e-12, -torch.inf)
        return (1e-9 * accuracy - cost).masked_fill(accuracy < min_accuracy - 1e-12, -torch.inf)

    def value(thresholds: list[float]) -> float:
        accuracy, cost = evidence.measure(thresholds)
        return constrained(*torch.tensor([[accuracy], [cost]], dtype=torch.float64)).item()

    ends = _one_exit_policies(evidence)
    found = [ends[-1], *ends[:-1]]
    low, high = (torch.tensor(price).log().item() for price in PRICES)
    for _ in range(36):
        price = torch.tensor((low + high) / 2).exp().item()
        policy = _at_price(evidence, price, [found[-1], ends[0], ends[-1]])
        found.append(policy)
        accuracy, cost = evidence.measure(policy)
        too_dear = cost > max_cost if max_cost is not None else accuracy >= min_accuracy
        low, high = ((low + high) / 2, high) if too_dear else (low, (low + high) / 2)
    best = sorted((policy for policy in _unique(found) if value(policy) > -torch.inf), key=value)[-3:]
    best = max((ascend(evidence, policy, constrained) for policy in best), key=value, default=None)
    if best is None or not evidence.leaves(best).any():
        return None
    return best


def frontier(evidence: Evidence, max_risk: float, num_prices: int = 80) -> list[list[float]]:
    """List policies of ever less compute, as far as they lose ``max_risk`` of accuracy against the deepest exit.

    There are two kinds: those of most accuracy for their cost, which change many answers for better and worse, and
    those that spoil the fewest answers for their cost, which change few.
    """
    lost = (evidence.correct[-1] - evidence.correct).clamp(min=0)
    found = []
    for view in (evidence, replace(evidence, correct=1 - lost)):
        policy = _one_exit_policies(view)[-1]
        for price in torch.logspace(-5, 1, num_prices).tolist():
            policy = _at_price(view, price, [policy])
            if view.correct[-1].mean() - view.measure(policy)[0] > max_risk:
                break
            found.append(policy)
    return _unique(found)


def _at_price(evidence: Evidence, price: float, starts: list[list[float]]) -> list[float]:
    """Return the policy of most accuracy minus ``price`` times cost, ascending from several starts."""

    def worth(accuracy, cost):
        return accuracy - price * cost

    return max(
        (ascend(evidence, start, worth) for start in _unique(starts)), key=lambda end: worth(*evidence.measure(end))
    )


def _one_exit_policies(evidence: Evidence) -> list[list[float]]:
    """List the policies that let everybody leave at one exit, shallow to deep."""
    num_early = len(evidence.scores)
    return [[evidence.never] * exit + [0.0] * (num_early - exit) for exit in range(num_early + 1)]


def _unique(policies: list[list[float]]) -> list[list[float]]:
    return [list(policy) for policy in dict.fromkeys(tuple(policy) for policy in policies)]
