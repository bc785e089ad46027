"""Times of several candidates in one process, in turn, so that other load on the machine affects all equally."""

import time
from statistics import median


def time_in_turn(candidates: dict, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time each candidate once a round, first in another place each time; seconds by the clock and of the CPU."""
    names = list(candidates)
    times = {name: {"wall": [], "cpu": []} for name in names}
    for candidate in candidates.values():
        candidate()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            candidates[name]()
            times[name]["wall"].append(time.perf_counter() - wall)
            times[name]["cpu"].append(time.process_time() - cpu)
    return times


def ratio(times: dict, numerator: list[tuple[float, str]], denominator: str, clock: str) -> float:
    """Median over rounds of a weighted sum of times over the time of another candidate in the same round."""
    sums = zip(*[[weight * value for value in times[name][clock]] for weight, name in numerator], strict=True)
    return median(sum(parts) / below for parts, below in zip(sums, times[denominator][clock], strict=True))
