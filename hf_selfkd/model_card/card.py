"""Model cards: the facts of a run in, a README.md that the Hub validates and a picture out."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..evaluation.costs import exit_costs, exit_latencies, exit_parameters
from ..evaluation.curves import plot_curves
from .facts import CardFacts, source_of_weights
from .sections import cite, describe_policy, describe_results, describe_training, describe_use, papers, summarise

CARD = "README.md"
PICTURE = "anytime_curve.png"
# Runs that the milliseconds of a card are the median of: few, because a card is written whenever a model is saved.
LATENCY_RUNS = 10

_TITLES = {
    "accuracy": "accuracy (%)",
    "calibration_error": "calibration error (%)",
    "mean_iou": "mean IoU (%)",
    "pixel_accuracy": "pixel accuracy (%)",
}


def write_model_card(model: PreTrainedModel, folder: str | Path, facts: CardFacts) -> None:
    """Write ``README.md`` and the anytime curve into a folder. What is not known is left out, never guessed.

    Multiply-adds and parameters per exit are counted, which takes no memory; milliseconds per exit are measured by
    eleven runs on one image, on the device that the model is on.

    Args:
        model: A multi-exit model.
        folder: Where the card goes, beside the checkpoint.
        facts: What is known of the model beside itself.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    is_classifier = model.task == "image-classification"
    costs = exit_costs(model) if is_classifier else []
    latencies = _measure(model) if is_classifier and not facts.is_sharded else []
    rows = exit_rows(model, facts.metrics, costs, latencies)
    picture = None
    if len(costs) > 1 and (scores := exit_scores(model, facts.metrics)):
        curve = [{"share": cost / costs[-1], "accuracy": scores[f"exit {exit}"]} for exit, cost in enumerate(costs)]
        picture = PICTURE
        plot_curves({"single exits": curve}, str(folder / picture))
    if model.num_exits > 1 and (ensemble := _scores_of(facts.metrics, "ensemble")):
        rows.append(dict.fromkeys(rows[0], "") | {"exit": "ensemble"} | ensemble)
    sections = {
        "Use": describe_use(model, facts.repository),
        "Results": describe_results(model, facts, rows, picture, LATENCY_RUNS if latencies else 0),
        "Early exit": describe_policy(model, is_old=facts.has_old_policy) if len(costs) > 1 else "",
        "Training": describe_training(facts),
        "Citation": cite(papers(facts.method, model.config.exit_policy)),
    }
    body = "".join(f"\n## {title}\n\n{section}\n" for title, section in sections.items() if section)
    metadata = card_metadata(model, facts).to_yaml()
    ModelCard(f"---\n{metadata}\n---\n\n# {facts.name}\n\n{summarise(model, facts)}\n{body}").save(folder / CARD)


def update_model_card(model: PreTrainedModel, folder: str | Path, trial: dict[str, Any] | None = None) -> None:
    """Tell of the exit policy in a card that was written before the policy was found.

    The rest of the card stays as it is, with what people wrote into it. A folder without a card gets one.

    Args:
        model: The model with its new ``config.exit_policy``.
        folder: Where the card lies.
        trial: What the policy was worth on other images, see :func:`~hf_selfkd.model_card.sections.describe_policy`.
    """
    folder = Path(folder)
    if not (folder / CARD).exists():
        name = folder.resolve().name
        write_model_card(model, folder, CardFacts(name=name, repository=name, base_model=source_of_weights(model)))
    card = ModelCard.load(folder / CARD)
    card.text = _replace_section(card.text, "Early exit", describe_policy(model, trial))
    cited = re.findall(r"url = {(.+)}", _section(card.text, "Citation"))
    citations = cite([*cited, *papers(None, model.config.exit_policy)])
    if citations:
        card.text = _replace_section(card.text, "Citation", citations)
    card.save(folder / CARD)


def _section(text: str, title: str) -> str:
    """Return a section with its title, up to the next one; what looks like a title in a block of code is none."""
    lines, is_inside, is_code = [], False, False
    for line in text.splitlines(keepends=True):
        is_code ^= line.startswith("```")
        if line.startswith("## ") and not is_code:
            is_inside = line == f"## {title}\n"
        if is_inside:
            lines.append(line)
    return "".join(lines)


def _replace_section(text: str, title: str, section: str) -> str:
    """Put a section into the place of that of the same title, or behind the others."""
    old, new = _section(text, title), f"## {title}\n\n{section}\n"
    if not old:
        return f"{text.rstrip()}\n\n{new}"
    return text.replace(old, new if text.endswith(old) else f"{new}\n")


def exit_scores(model: PreTrainedModel, metrics: dict[str, float]) -> dict[str, float]:
    """Return accuracy, or mean IoU, under ``exit 0``, ..., ``ensemble``; empty where it was not measured."""
    metric = _metric(model)
    keys = {f"exit {exit}": f"eval_{metric}_exit_{exit}" for exit in range(model.num_exits)}
    if model.num_exits > 1:
        keys["ensemble"] = f"eval_{metric}_ensemble"
    scores = {name: metrics.get(key) for name, key in keys.items()}
    return scores if all(map(_is_known, scores.values())) else {}


def exit_rows(
    model: PreTrainedModel,
    metrics: dict[str, float],
    costs: Sequence[int] = (),
    latencies: Sequence[float] = (),
) -> list[dict[str, Any]]:
    """Return a row per exit, shallow to deep: what was measured, and what an image costs that leaves there.

    Args:
        model: A multi-exit model.
        metrics: What ``evaluate`` of the trainer returned; empty if nothing was evaluated.
        costs: Multiply-adds per exit, of a model for classification.
        latencies: Milliseconds per exit, if they were measured.
    """
    rows: list[dict[str, Any]] = [
        {"exit": exit} | _scores_of(metrics, f"exit_{exit}") for exit in range(model.num_exits)
    ]
    if costs:
        for row, cost, parameters in zip(rows, costs, exit_parameters(model), strict=True):
            row |= {"million multiply-adds": f"{cost / 1e6:.2f}", "million parameters": f"{parameters / 1e6:.3f}"}
    for row, latency in zip(rows, latencies, strict=False):
        row["milliseconds"] = f"{latency:.2f}"
    return rows


def _scores_of(metrics: dict[str, float], name: str) -> dict[str, str]:
    found = {title: metrics.get(f"eval_{metric}_{name}") for metric, title in _TITLES.items()}
    # As many digits as the metadata has.
    return {title: f"{100 * round(value, 4):.2f}" for title, value in found.items() if _is_known(value)}


def _is_known(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def card_metadata(model: PreTrainedModel, facts: CardFacts) -> ModelCardData:
    """Return the metadata that the Hub reads: what loads the model, its tags, and a result per exit."""
    metric, scores = _metric(model), exit_scores(model, facts.metrics)
    method_tags = facts.method.name.split("+") if facts.method is not None else []
    # The Hub refuses results without the data that they are of.
    has_results = scores and (facts.dataset or facts.dataset_tags)
    results = [
        EvalResult(
            task_type=model.task,
            dataset_type=[*facts.dataset_tags, facts.dataset][0],
            dataset_name=facts.dataset or facts.dataset_tags[0],
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')} ({name})",
            metric_value=round(score, 4),
        )
        for name, score in (scores.items() if has_results else ())
    ]
    return ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=model.task,
        tags=[*model.model_tags, *method_tags, *facts.tags],
        datasets=list(facts.dataset_tags) or None,
        base_model=facts.base_model,
        metrics=[metric] if scores else None,
        eval_results=results or None,
        model_name=facts.name if results else None,
    )


def _metric(model: PreTrainedModel) -> str:
    return "accuracy" if model.task == "image-classification" else "mean_iou"


def _measure(model: PreTrainedModel) -> list[float]:
    was_training = model.training
    model.eval()
    try:
        return exit_latencies(model, repeats=LATENCY_RUNS)
    finally:
        model.train(was_training)
