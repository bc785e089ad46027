"""Curves of accuracy against cost, as rows, tables and figures."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.calibrate import fit_policy, gather_evidence, solve
from ..calibration.decisions import CLASSES, LABEL_SETS


@torch.no_grad()
def collect_logits(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collect the logits of all exits on labelled images.

    Args:
        model: A multi-exit model for classification, in eval mode.
        batches: Dictionaries with ``pixel_values`` and ``labels``, such as those of a ``DataLoader``.

    Returns:
        Logits ``(exits, images, classes)`` in float32 and labels ``(images,)``, of a multi-label model
        ``(images, classes)``, on the CPU.

    Raises:
        ValueError: If the model is in training mode.
    """
    if model.training:
        raise ValueError("collect_logits needs a model in eval mode, but it is in training mode. Call model.eval().")
    logits, labels = [], []
    for batch in batches:
        targets = batch["labels"].to(model.device)
        output = model(batch["pixel_values"].to(model.device), labels=targets, return_dict=True)  # labels: all exits
        logits.append(torch.stack(output.exit_logits).float().cpu())
        labels.append(targets.cpu())
    return torch.cat(logits, dim=1), torch.cat(labels)


def anytime_curve(exit_logits: Tensor, labels: Tensor, costs: Sequence[float]) -> list[dict[str, float]]:
    """Return accuracy and cost of each exit alone (anytime prediction: MSDNet, Huang et al. 2018, section 3).

    Args:
        exit_logits: ``(exits, images, classes)``.
        labels: Class indices ``(images,)``, or of a multi-label model 0 or 1 and -100 where unknown,
            ``(images, classes)``: then accuracy is the share of images all of whose labels are predicted.
        costs: Cost of an image that exits at each exit.

    Returns:
        Rows with ``exit``, ``cost``, ``share`` of the full cost, and ``accuracy``.
    """
    decisions = CLASSES if labels.ndim == 1 else LABEL_SETS
    return [
        {
            "exit": exit,
            "cost": cost,
            "share": cost / costs[-1],
            "accuracy": decisions.is_correct(decisions.predict(logits), labels).double().mean().item(),
        }
        for exit, (logits, cost) in enumerate(zip(exit_logits, costs, strict=True))
    ]


def budgeted_curve(
    exit_logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    test_logits: Tensor,
    test_labels: Tensor,
    *,
    targets: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    criterion: str = "confidence",
) -> list[dict[str, float]]:
    """Return accuracy against mean cost as the budget varies (MSDNet, Huang et al. 2018, budgeted classification).

    Args:
        exit_logits: Logits to calibrate policies on, ``(exits, images, classes)``.
        labels: Their labels.
        costs: Cost of an image that exits at each exit.
        test_logits: Logits of unseen images, to evaluate policies on.
        test_labels: Their labels.
        targets: Budgets as shares of the full cost; those below the cost of the cheapest exit are skipped.
        criterion: Name of the score that policies use.

    Returns:
        Rows with ``target``, ``cost``, ``share`` of the full cost, and ``accuracy``.
    """
    policy = fit_policy(exit_logits, labels, criterion)
    evidence = gather_evidence(exit_logits, labels, costs, policy)
    rows = []
    for target in targets:
        if target >= evidence.costs.min():
            best = solve(policy, evidence, target_cost=target)
            test = gather_evidence(test_logits, test_labels, costs, best)
            accuracy, share = test.measure(list(best.thresholds))
            rows.append({"target": target, "cost": share * costs[-1], "share": share, "accuracy": accuracy})
    return rows


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as a Markdown table, one column per key.

    Example:
        >>> print(to_table([{"exit": 0, "accuracy": 0.51239}]))
        | exit | accuracy |
        | --- | --- |
        | 0 | 0.5124 |
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(row.get(key, "")) for key in rows[0]] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).replace("|", "\\|").split("\n"))


def plot_curves(curves: dict[str, Sequence[dict[str, float]]], path: str, score: str = "accuracy") -> None:
    """Draw accuracy, or another score in its place, against the share of the full cost.

    Args:
        curves: Rows of :func:`anytime_curve` and :func:`budgeted_curve`, by their names in the legend.
        path: File to write; its ending decides the format.
        score: Name of what the rows have as ``accuracy``.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A plot needs matplotlib. Run pip install hf_selfkd[plots].") from error

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        axes.plot([row["share"] for row in rows], [row["accuracy"] for row in rows], marker="o", label=name)
    axes.set_xlabel("mean cost, share of the full network")
    axes.set_ylabel(score)
    axes.legend()
    figure.savefig(path)
