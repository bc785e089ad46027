"""Values that template.md is filled with: rows of tables, numbers and BibTeX, each from plain facts. No prose."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..evaluation.costs import exit_parameters
from ..evaluation.curves import to_table
from ..models.criteria import CRITERIA
from ..models.exit_policy import ExitPolicy
from ..tasks import ADAPTER_EXAMPLE, TENSOR_EXAMPLE, task_of
from .facts import CardFacts, is_known

_BIBLIOGRAPHY = (Path(__file__).parent / "citations.bib").read_text(encoding="utf-8").strip().split("\n\n")
_TEMPERATURE_SCALING = "https://arxiv.org/abs/1706.04599"
_LEARN_THEN_TEST = "https://arxiv.org/abs/2110.01052"

# Metrics that the stock trainer adds to every evaluation.
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")

# Fields of ExitPolicy.calibration that the card describes.
_CALIBRATION = {"demand", "samples", "expected_accuracy", "expected_cost", "full_accuracy"}


def template_values(
    model: PreTrainedModel,
    facts: CardFacts,
    counts: tuple[Sequence[int], Sequence[int]] | None,
    picture: str | None,
) -> dict[str, Any]:
    """Return all variables of template.md.

    Args:
        model: A multi-exit model; only its configuration and structure are read.
        facts: Facts that the model does not hold.
        counts: Multiply-adds and parameters per exit, of a model for classification.
        picture: File name of the anytime curve, ``None`` if there is none.
    """
    config, task = model.config, task_of(model)
    costs, parameters = counts or ((), ())
    latencies = facts.latency["milliseconds"] if facts.latency else ()
    exits = exit_rows(model, facts.metrics, costs, latencies, parameters)
    return {
        "facts": facts,
        "config": config,
        "task": task,
        "is_adapter": is_adapter(model),
        "example": example(model, facts.repository),
        "input_size": "x".join(str(side) for side in config.pretrained_cfg["input_size"]),
        "backbone_kwargs": json.dumps(config.backbone_kwargs, sort_keys=True),
        "stages": model.exit_stages,
        "exits": exits,
        "is_evaluated": task.metric_titles[task.metric] in exits[0],
        "own_metrics": own_metrics(model, facts.metrics),
        "results": [result | _tables(model, result["metrics"]) for result in facts.results],
        "num_parameters": None if counts else num_inference_parameters(model),
        "precision": next((name for name in ("bf16", "fp16") if facts.recipe.get(name)), None),
        "picture": picture,
        "has_early_exit": counts is not None and model.num_exits > 1,
        "policy": policy_values(config.exit_policy) if config.exit_policy else None,
        "settings": [{"setting": name, "value": written(value)} for name, value in facts.recipe.items()],
        "hyper_parameters": {name: written(value) for name, value in facts.hyper_parameters.items()},
        "citations": cite(papers(facts.methods, config.exit_policy)),
        "table": to_table,
    }


def is_adapter(model: PreTrainedModel) -> bool:
    """Whether PEFT has put an adapter into the model, which is then all that the checkpoint holds."""
    return hasattr(model, "peft_config")


def example(model: PreTrainedModel, repository: str) -> str:
    """Return Python code that uses the model from the Hub: a pipeline, where pipelines read such images."""
    task, (channels, height, width) = task_of(model), model.config.pretrained_cfg["input_size"]
    if is_adapter(model):
        return ADAPTER_EXAMPLE.format(repository=repository, model_class=type(model).__name__)
    if channels in (1, 3):
        return task.example.format(repository=repository, num_labels=model.config.num_labels)
    sizes = {"channels": channels, "height": height, "width": width}
    return TENSOR_EXAMPLE.format(repository=repository, auto_class=task.auto_class, **sizes)


def _tables(model: PreTrainedModel, metrics: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    return {"exits": exit_rows(model, metrics), "own_metrics": own_metrics(model, metrics)}


def own_metrics(model: PreTrainedModel, metrics: dict[str, float]) -> list[dict[str, Any]]:
    """Return a table row per metric that the user's ``compute_metrics`` added."""
    of_exits = ("loss", *task_of(model).metric_titles)
    names = (name.removeprefix("eval_") for name in metrics if name.startswith("eval_"))
    return [
        {"metric": name, "value": metrics[f"eval_{name}"]}
        for name in names
        if name not in (*of_exits, *_SPEED) and not re.fullmatch(rf"(exit_\d+|ensemble)_({'|'.join(of_exits)})", name)
    ]


def exit_rows(
    model: PreTrainedModel,
    metrics: dict[str, float],
    costs: Sequence[int] = (),
    latencies: Sequence[float] = (),
    parameters: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Return a table row per exit, first to final: its metrics, and the cost of an image up to there.

    The last row is the ensemble's, if it was evaluated.

    Args:
        model: A multi-exit model.
        metrics: Return value of the trainer's ``evaluate``; empty if nothing was evaluated.
        costs: Multiply-adds per exit, of a model for classification.
        latencies: Milliseconds per exit, if they were measured.
        parameters: Parameters per exit; counted here if there are ``costs`` and these are left out.
    """
    rows: list[dict[str, Any]] = [
        {"exit": exit} | _scores_of(model, metrics, f"exit_{exit}") for exit in range(model.num_exits)
    ]
    if costs:
        for row, cost, size in zip(rows, costs, parameters or exit_parameters(model), strict=True):
            row |= {"multiply-adds (M)": f"{cost / 1e6:.2f}", "parameters (M)": f"{size / 1e6:.3f}"}
    for row, latency in zip(rows, latencies, strict=False):
        row["latency (ms)"] = f"{latency:.2f}"
    if model.num_exits > 1 and (ensemble := _scores_of(model, metrics, "ensemble")):
        rows.append(dict.fromkeys(rows[0], "") | {"exit": "ensemble"} | ensemble)
    return rows


def _scores_of(model: PreTrainedModel, metrics: dict[str, float], name: str) -> dict[str, str]:
    titles = task_of(model).metric_titles
    found = {title: metrics.get(f"eval_{name}_{metric}") for metric, title in titles.items()}
    # As many digits as the metadata has.
    return {title: f"{100 * round(value, 4):.2f}" for title, value in found.items() if is_known(value)}


def exit_scores(model: PreTrainedModel, metrics: dict[str, float]) -> dict[str, float]:
    """Return the headline metric under ``exit 0``, ..., ``ensemble``; empty if one of them is unknown."""
    metric = task_of(model).metric
    keys = {f"exit {exit}": f"eval_exit_{exit}_{metric}" for exit in range(model.num_exits)}
    if model.num_exits > 1:
        keys["ensemble"] = f"eval_ensemble_{metric}"
    scores = {name: metrics.get(key) for name, key in keys.items()}
    return scores if all(map(is_known, scores.values())) else {}


def num_inference_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters without those of the scaffold."""
    return sum(tensor.numel() for name, tensor in model.named_parameters() if not name.startswith("scaffold."))


def policy_values(fields: dict[str, Any]) -> dict[str, Any]:
    """Return criterion, thresholds and calibration of a policy, given as in ``config.exit_policy``."""
    policy = ExitPolicy.from_dict(fields)
    thresholds = [
        (limit or "always") if policy.is_reachable(exit) else "never" for exit, limit in enumerate(policy.thresholds)
    ]
    record = policy.calibration or {}
    return {
        "criterion": policy.criterion,
        "description": CRITERIA[policy.criterion].description,
        "is_scaled": CRITERIA[policy.criterion].uses_temperature,
        "rows": [
            {"exit": exit, "threshold": threshold, "temperature": temperature}
            for exit, (threshold, temperature) in enumerate(
                zip([*thresholds, "always"], policy.temperatures, strict=True)
            )
        ],
        "has_early_exits": any(map(policy.is_reachable, range(policy.num_exits - 1))),
        "calibration": record if record.keys() >= _CALIBRATION else None,
        "has_labels": record.get("reference", "labels") == "labels",
    }


def written(value: Any) -> str:
    """Format the value of a setting."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(written(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


def papers(methods: Iterable[dict[str, str]], policy: dict[str, Any] | None) -> list[str]:
    """Return the URLs of the papers of the methods, and of those that calibrated the exit policy."""
    found = [method["paper"] for method in methods]
    if policy is not None:
        found += [_TEMPERATURE_SCALING] if set(policy["temperatures"]) != {1.0} else []
        found += [_LEARN_THEN_TEST] if "max_risk" in ((policy.get("calibration") or {}).get("demand") or {}) else []
    return found


def cite(papers: Iterable[str]) -> str:
    """Return the BibTeX entries of papers, given by URL; unknown ones are left out."""
    entries = [entry for paper in dict.fromkeys(papers) for entry in _BIBLIOGRAPHY if f"{{{paper}}}" in entry]
    return "\n\n".join(entries)
