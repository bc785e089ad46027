"""Guarantees on the risk of an exit policy: p-values for finite samples, and the order of the tests."""

import math

import torch

from .search import Evidence


def certify(
    policies: list[list[float]],
    proposal: Evidence,
    test: Evidence,
    max_risk: float,
    delta: float,
    *,
    signed: bool,
) -> list[float] | None:
    """Return the cheapest policy whose risk is certified to be at most ``max_risk`` with probability ``1 - delta``.

    Fixed sequence testing: policies are tested one after the other, each at level ``delta``, until one cannot
    be certified. This keeps the chance of any false claim at ``delta`` as long as the order does not depend on the
    test images (Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052, section 2.3). As in Pareto testing
    (Laufer-Goldshtein et al., ICLR 2023, https://arxiv.org/abs/2210.07913) other images give the order: the policy
    that looks safest first, then policies of decreasing cost.

    Args:
        policies: Thresholds of each policy.
        proposal: The images that the policies were found on.
        test: Other images, drawn independently from the same distribution.
        max_risk: The largest risk allowed, in (0, 1).
        delta: Chance of a false claim, in (0, 1).
        signed: Whether an early prediction may also be correct where the final exit is wrong, which lowers the risk.

    Returns:
        The thresholds, ``None`` if not even the first policy can be certified.
    """
    certified = None
    for stake, policy in _safest_first(policies, proposal, max_risk):
        lost, won, num_images = _count(test, policy)
        if signed:
            p_value = betting_p_value(lost, won, num_images, max_risk, stake)
        else:
            p_value = binomial_p_value(lost, num_images, max_risk)
        if p_value > delta:
            break
        certified = policy
    return certified


def _safest_first(policies: list[list[float]], proposal: Evidence, max_risk: float) -> list[tuple[float, list[float]]]:
    """Order policies by how fast wealth grows against them, without those no cheaper than a safer one."""
    judged = []
    for policy in policies:
        stake, growth = best_stake(*_count(proposal, policy), max_risk)
        judged.append((-growth, proposal.measure(policy)[1], stake, policy))
    kept, least_cost = [], 1.0
    for _, cost, stake, policy in sorted(judged):
        if cost < least_cost:
            kept.append((stake, policy))
            least_cost = cost
    return kept


def _count(evidence: Evidence, policy: list[float]) -> tuple[int, int, int]:
    """Count images that only the final exit classifies correctly, that only the policy does, and all images."""
    chosen = evidence.correct.gather(0, evidence.exit_index(policy).unsqueeze(0)).squeeze(0)
    change = evidence.correct[-1] - chosen
    return int((change > 0).sum()), int((change < 0).sum()), len(change)


def binomial_p_value(lost: int, num_images: int, max_risk: float) -> float:
    """Return the exact chance of at most ``lost`` losses among images that are each lost with chance ``max_risk``.

    Example:
        >>> round(binomial_p_value(0, 100, 0.05), 6)  # 0.95 ** 100
        0.005921
    """
    n, k = float(num_images), torch.arange(lost + 1, dtype=torch.float64)
    log_choices = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log_chances = log_choices + k * math.log(max_risk) + (n - k) * math.log1p(-max_risk)
    return min(1.0, log_chances.logsumexp(0).exp().item())


def betting_p_value(lost: int, won: int, num_images: int, max_risk: float, stake: float) -> float:
    """Return a p-value for a mean of at least ``max_risk`` of a loss that is 1, 0 or -1.

    A gambler who bets the share ``stake`` against each image in turn ends with a wealth of
    ``prod_i (1 + stake * (max_risk - loss_i))``. Its expectation is at most 1 if the mean is ``max_risk`` or more, so
    that its inverse is a p-value by Markov's inequality (Waudby-Smith and Ramdas, JRSS B 2024,
    https://arxiv.org/abs/2010.09686, section 4). Bounds from the range [-1, 1] of
    the loss alone are useless here; this one is the sharper, the fewer predictions change.

    Args:
        lost: Images with loss 1.
        won: Images with loss -1.
        num_images: All images.
        max_risk: The mean to refute.
        stake: In [0, 1 / (1 - max_risk)), chosen independently of these images.

    Example:
        >>> round(betting_p_value(0, 0, 100, 0.05, 1.0), 6)  # 1.05 ** -100
        0.007604
    """
    same = num_images - lost - won
    log_wealth = (
        lost * math.log1p(stake * (max_risk - 1))
        + won * math.log1p(stake * (max_risk + 1))
        + same * math.log1p(stake * max_risk)
    )
    return min(1.0, math.exp(min(0.0, -log_wealth)))


def best_stake(lost: int, won: int, num_images: int, max_risk: float) -> tuple[float, float]:
    """Return the stake with the fastest growth of wealth on images like these, and the growth of its logarithm.

    One more lost image is assumed, so that no stake relies on never losing.
    """
    stakes = torch.linspace(0, 1 / (1 - max_risk), 1001, dtype=torch.float64)[:-1]
    growth = (
        (lost + 1) * torch.log1p(stakes * (max_risk - 1))
        + won * torch.log1p(stakes * (max_risk + 1))
        + (num_images - lost - won) * torch.log1p(stakes * max_risk)
    )
    best = growth.argmax()
    return stakes[best].item(), growth[best].item()
