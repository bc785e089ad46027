"""Table and plot of the runs of `accuracy.py`: means, paired differences to the baseline, every exit."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from scipy.stats import t as student_t

from hf_selfkd.evaluation.curves import to_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "none"
Runs = dict[str, list[dict]]


def summarise(folder: Path, protocol: dict, num_seeds: int, description: str, order: Sequence[str]) -> str:
    """Write ``table.md`` and ``accuracy.png`` of the runs in a folder, and return the table with its caption.

    Args:
        folder: Where they are, one JSON each.
        protocol: What they must have in common.
        num_seeds: Runs that a complete configuration has.
        description: The protocol in words.
        order: Names of configurations, as they are listed; others follow.
    """
    runs = read_runs(folder, protocol, order)
    if not runs:
        return f"No run is complete yet in {folder}."
    table = to_table([row(configuration, runs) for configuration in runs])
    text = f"{table}\n\n{caption(runs, num_seeds, description)}"
    (folder / "table.md").write_text(f"{text}\n")
    plot(runs, folder / "accuracy.png")
    return text


def read_runs(folder: Path, protocol: dict, order: Sequence[str]) -> Runs:
    """Read the runs in a folder, those of each configuration together, by seed.

    Raises:
        ValueError: If a run was made by another protocol, or with other exits than the rest.
    """
    runs: Runs = {}
    common = {"protocol": protocol}
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        for key in ("protocol", "exits"):
            if common.setdefault(key, run[key]) != run[key]:
                raise ValueError(f"{path} differs from the others in {key}. Move it away, and it is run again.")
        runs.setdefault(run["configuration"], []).append(run)
    known = [name for name in order if name in runs]
    return {name: runs[name] for name in [*known, *(name for name in runs if name not in known)]}


def difference(runs: Sequence[dict], baseline: Sequence[dict], exit: str) -> tuple[float, float | None] | None:
    """Compare the accuracies of an exit, seed by seed, in percentage points.

    Returns:
        The mean difference over the seeds that both have, and half the width of its 95 % interval by the t
        distribution, ``None`` for a single seed; ``None`` where they share no seed.
    """
    theirs = {run["seed"]: run["accuracy"][exit] for run in baseline}
    pairs = [100 * (run["accuracy"][exit] - theirs[run["seed"]]) for run in runs if run["seed"] in theirs]
    if len(pairs) < 2:
        return (pairs[0], None) if pairs else None
    return mean(pairs), float(student_t.ppf(0.975, len(pairs) - 1)) * stdev(pairs) / len(pairs) ** 0.5


def row(configuration: str, runs: Runs) -> dict[str, str]:
    """Return a row of the table: means and standard errors over seeds in percent, and what is gained at what price."""
    own, baseline = runs[configuration], runs.get(BASELINE, [])
    *_, final, ensemble = exits = list(own[0]["accuracy"])
    compared = None if configuration == BASELINE else difference(own, baseline, final)
    cells = {"configuration": configuration, "seeds": str(len(own))}
    cells |= {label(exit): with_error([run["accuracy"][exit] for run in own]) for exit in exits}
    cells[f"{label(final)} over {BASELINE}"] = "" if compared is None else with_interval(*compared)
    cells["best epoch"] = with_error([run["best"]["accuracy"][final] for run in own])
    cells["training time"] = f"x {minutes(own) / minutes(baseline):.2f}" if baseline else ""
    return cells


def label(exit: str) -> str:
    return exit.replace("_", " ")


def minutes(runs: Sequence[dict]) -> float:
    """Return the mean training time, by the CPU's clock where the CPU does the work: others may share it."""
    return mean(run["minutes"]["cpu" if run["on_cpu"] else "wall"] for run in runs)


def with_error(accuracies: Sequence[float]) -> str:
    values = [100 * accuracy for accuracy in accuracies]
    return f"{mean(values):.2f}" + (f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else "")


def with_interval(difference: float, half_width: float | None) -> str:
    if half_width is None:
        return f"{difference:+.2f}"
    return f"{difference:+.2f} [{difference - half_width:+.2f}, {difference + half_width:+.2f}]"


def caption(runs: Runs, num_seeds: int, description: str) -> str:
    first = next(iter(runs.values()))[0]
    costs = ", ".join(f"{cost / 1e6:.1f}" for cost in first["exits"]["multiply_adds"])
    text = (
        f"{description} Exits after stages {', '.join(map(str, first['exits']['stages']))} "
        f"({', '.join(sorted(set(first['exits']['heads'])))}) and the final one, at {costs} million multiply-adds. "
        "Accuracy on the test images after the last epoch in percent, mean ± standard error over seeds. "
        f"*over {BASELINE}*: mean difference between runs of equal seeds and its 95 % interval (t distribution). "
        f"*best epoch*: best accuracy of the final exit, evaluated every {first['protocol']['eval_epochs']} epochs. "
        f"*training time*: over that of {BASELINE}."
    )
    counts = {name: len(own) for name, own in runs.items()}
    if min(counts.values()) < num_seeds:
        missing = ", ".join(f"{name} {count}" for name, count in counts.items() if count < num_seeds)
        text += f"\n\nIncomplete: of {num_seeds} seeds there are {missing}."
    if min(counts.values()) < 3:
        text += (
            "\n\nOne seed gives no interval; that of two seeds, 12.7 standard errors to each side, says little. "
            "Three are the fewest for a verdict."
        )
    return text


def plot(runs: Runs, path: Path) -> None:
    """Draw a panel for each exit and the ensemble: every run, the means, and the baseline as a line through all."""
    first = next(iter(runs.values()))[0]
    exits = list(first["accuracy"])
    costs = [f"{cost / 1e6:.1f} M multiply-adds" for cost in first["exits"]["multiply_adds"]]
    figure, panels = plt.subplots(1, len(exits), figsize=(2.3 * len(exits) + 1.5, 0.35 * len(runs) + 1.5), sharey=True)
    for panel, exit, note in zip(panels, exits, [*costs, "mean of all logits"], strict=True):
        for height, (configuration, own) in enumerate(runs.items()):
            draw(panel, height, [100 * run["accuracy"][exit] for run in own], is_baseline=configuration == BASELINE)
        panel.set_title(f"{label(exit)}\n{note}", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(runs)), list(runs))
    panels[0].invert_yaxis()
    figure.supxlabel(f"test accuracy (%): dots are runs, bars means, the dashed line is {BASELINE}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(panel: plt.Axes, height: int, values: Sequence[float], is_baseline: bool) -> None:
    colour = "black" if is_baseline else "tab:blue"
    panel.plot(values, [height] * len(values), "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0)
    panel.plot(mean(values), height, "|", color=colour, markersize=13, markeredgewidth=2)
    if is_baseline:
        panel.axvline(mean(values), color="black", linewidth=0.8, linestyle="--", zorder=0)
