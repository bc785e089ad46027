"""A counter of exits that notices drift without labels. Needs the standard library only, as servers may have no torch.

Harder, easier or other images exit elsewhere than the calibration images did. For every early exit the share of images
that have exited by then is tested, in two steps:

1. An interval for the share, from the calibration counts, by Chernoff's bound in its form with the relative entropy
   (Hoeffding, JASA 1963, theorem 1), which holds for any number of images.
2. An e-process against all shares in that interval: the chance of the images counted since under a mixture of all
   shares (the Beta(1/2, 1/2) mixture of Krichevsky and Trofimov, 1981) over their largest chance under a share in the
   interval. For each of these shares it is at most a nonnegative martingale that starts at 1, so by Ville's inequality
   it ever reaches 1 / p with chance p at most, however often one looks (Ramdas et al., Statistical Science 2023,
   https://arxiv.org/abs/2210.01948, section 3).

Half of ``alpha`` is spent on each step, in equal parts for all early exits.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any


class ExitCounter:
    """Count where images exit, and tell whether that still agrees with calibration, without labels.

    If the images are drawn independently from the distribution of the calibration images, :attr:`has_drifted` is ever
    true with probability ``alpha`` at most, however often it is read. The proof takes thresholds that were chosen on
    other images than those counted. :func:`calibrate` counts the images that it chose them on, which Chernoff's bound
    proved wide enough for in simulations, as a test repeats.

    Frames of a video or bursts of one camera are not independent and may raise an alarm. Equal exit rates do not show
    that the accuracy is what it was. All images count alike, so that a long past hides a recent change: begin a new
    counter every day, say.

    Args:
        expected_counts: How many calibration images exited at each exit: ``policy.calibration["exit_counts"]`` of the
            policy in use, which may have come from :meth:`ExitPolicy.at`.
        alpha: Chance of a false alarm, in (0, 1).

    Attributes:
        counts: How many images exited at each exit since.

    Raises:
        ValueError: If the counts are no counts of two exits or more, all of them are 0, or ``alpha`` is out of range.

    Example:
        >>> counter = ExitCounter([700, 200, 100])
        >>> counter.update([0, 0, 1, 0, 2])  # or output.exit_index
        >>> counter.has_drifted
        False
        >>> counter.add([250, 130, 120])  # of another process
        >>> counter.has_drifted
        True
    """

    def __init__(self, expected_counts: Sequence[int], *, alpha: float = 0.01):
        if not 0 < alpha < 1:
            raise ValueError(f"ExitCounter needs 0 < alpha < 1, but got alpha={alpha!r}.")
        if len(expected_counts) < 2 or not _are_counts(expected_counts) or not any(expected_counts):
            raise ValueError(
                "expected_counts must be the numbers of calibration images that exited at each of two exits or more, "
                f"but got {expected_counts!r}."
            )
        num_tests = len(expected_counts) - 1
        self.limit = 2 * num_tests / alpha
        images = sum(expected_counts)
        self.intervals = [
            share_interval(exited, images, alpha / 2 / num_tests) for exited in _cumulative(expected_counts)
        ]
        self.counts = [0] * len(expected_counts)

    @classmethod
    def for_policy(cls, policy: Mapping[str, Any], *, alpha: float = 0.01) -> "ExitCounter":
        """Return a counter for a policy given as a dictionary, such as ``exit_policy`` in ``config.json``.

        Raises:
            ValueError: If the policy does not hold where the calibration images exited.
        """
        counts = (policy.get("calibration") or {}).get("exit_counts")
        if counts is None:
            raise ValueError(
                "The policy does not hold where the calibration images exited: it was not found by calibrate, or by a "
                "version that did not record it. Calibrate it again."
            )
        return cls(counts, alpha=alpha)

    def update(self, exit_index: Any) -> None:
        """Count images.

        Args:
            exit_index: The exit of each image, such as ``output.exit_index``: a tensor, an array or integers.

        Raises:
            ValueError: If there is no such exit. Then none of the images is counted.
        """
        exits = exit_index.tolist() if hasattr(exit_index, "tolist") else exit_index
        exits = [exits] if isinstance(exits, int) else list(exits)
        if unknown := set(exits) - set(range(len(self.counts))):
            raise ValueError(f"The policy has {len(self.counts)} exits, from 0, but got {sorted(unknown)[0]!r}.")
        self.add([exits.count(exit) for exit in range(len(self.counts))])

    def add(self, counts: Sequence[int]) -> None:
        """Add the counts of another process, or of another day.

        Args:
            counts: Images that exited at each exit.

        Raises:
            ValueError: If they are no counts, or not one per exit.
        """
        if len(counts) != len(self.counts) or not _are_counts(counts):
            raise ValueError(
                f"counts must be {len(self.counts)} integers of at least 0, one per exit, but got {counts!r}."
            )
        self.counts = [old + new for old, new in zip(self.counts, counts, strict=True)]

    @property
    def e_values(self) -> list[float]:
        """Evidence against the share that has exited by each early exit; 1 is none."""
        images = sum(self.counts)
        exited = _cumulative(self.counts)
        return [
            math.exp(min(700.0, log_e_value(count, images, interval)))
            for count, interval in zip(exited, self.intervals, strict=True)
        ]

    @property
    def has_drifted(self) -> bool:
        """Whether some share differs from that of calibration."""
        return max(self.e_values) >= self.limit

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per early exit: the share that has exited by then, and what calibration expected."""
        images = max(1, sum(self.counts))
        columns = zip(self.intervals, _cumulative(self.counts), self.e_values, strict=True)
        return [
            {
                "exit": exit,
                "expected at least": low,
                "expected at most": high,
                "observed": exited / images,
                "e-value": e_value,
                "drifted": e_value >= self.limit,
            }
            for exit, ((low, high), exited, e_value) in enumerate(columns)
        ]


def share_interval(count: int, total: int, alpha: float) -> tuple[float, float]:
    """Return an interval that misses the chance of an event with probability ``alpha`` at most.

    Args:
        count: How often the event occurred.
        total: How often it could have.
        alpha: In (0, 1), half of it for each side.

    Example:
        >>> low, high = share_interval(0, 100, 0.05)
        >>> low, round(high, 6)  # 1 - 0.025 ** 0.01
        (0.0, 0.036217)
    """
    share, limit = count / total, math.log(2 / alpha) / total
    ends = []
    for outside in (0.0, 1.0):
        inside = share
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if _relative_entropy(share, middle) <= limit else (inside, middle)
        ends.append(outside)
    return ends[0], ends[1]


def log_e_value(count: int, total: int, interval: tuple[float, float]) -> float:
    """Return the logarithm of the e-value against all chances of an event in an interval.

    Args:
        count: How often the event occurred.
        total: How often it could have.
        interval: The chances, lowest and highest.
    """
    rest = total - count
    mixture = math.lgamma(count + 0.5) + math.lgamma(rest + 0.5) - math.lgamma(total + 1) - math.log(math.pi)
    chance = min(max(count / max(1, total), interval[0]), interval[1])
    return mixture - _times_log(count, chance) - _times_log(rest, 1 - chance)


def _relative_entropy(share: float, chance: float) -> float:
    return (
        _times_log(share, share)
        + _times_log(1 - share, 1 - share)
        - _times_log(share, chance)
        - _times_log(1 - share, 1 - chance)
    )


def _times_log(weight: float, chance: float) -> float:
    if weight == 0:
        return 0.0
    return weight * math.log(chance) if chance > 0 else -math.inf


def _cumulative(counts: Sequence[int]) -> list[int]:
    """Return how many images have exited by each early exit."""
    return [sum(counts[: exit + 1]) for exit in range(len(counts) - 1)]


def _are_counts(values: Sequence[int]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
