"""Model cards: template.md and the Hub's metadata, rendered from the facts of a run."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..evaluation.costs import exit_counts
from ..evaluation.curves import plot_curves
from ..tasks import task_of
from .environment import device_name
from .facts import CardFacts, source_of_weights
from .storage import as_stored, load_facts, save_card
from .values import exit_scores, is_adapter, template_values

PICTURE = "anytime_curve.png"
_TEMPLATE = Path(__file__).parent / "template.md"


def write_model_card(model: PreTrainedModel, folder: str | Path, facts: CardFacts) -> None:
    """Write ``README.md``, the anytime curve and ``card_facts.json`` into a folder. Unknown facts are left out.

    The curve is drawn where matplotlib is installed (``hf_selfkd[plots]``). Runs no forward pass: multiply-adds and
    parameters per exit are counted on the meta device.

    Args:
        model: A multi-exit model.
        folder: Folder of the checkpoint.
        facts: Facts that the model itself does not hold.

    Warns:
        UserWarning: If the folder has a ``README.md`` that was edited, or not written by this function. It is left as
            it is, and the card is written to ``README.new.md``.
    """
    _write(model, Path(folder), facts)


def update_model_card(model: PreTrainedModel, folder: str | Path, trial: dict[str, Any] | None = None) -> None:
    """Render a card again with the model's present exit policy and the stored facts of the run.

    A folder without a card gets one. An edited card is left as it is, see :func:`write_model_card`.

    Args:
        model: The model with its new ``config.exit_policy``.
        folder: Folder of the card.
        trial: Results of the policy on images that it was not calibrated on: ``num_images``, ``accuracy``, ``cost`` as
            a share of the full cost, and ``full_accuracy`` of the final exit; optionally ``images_per_second`` and
            ``plain_images_per_second`` (backbone alone) in batches of ``batch_size`` on the model's device, and
            ``picture``, the name of a file in the folder.

    Raises:
        ValueError: If ``card_facts.json`` in the folder cannot be read.

    Warns:
        UserWarning: As :func:`write_model_card`.
    """
    folder = Path(folder)
    name = folder.resolve().name
    facts = load_facts(folder) or CardFacts(name=name, repository=name, base_model=source_of_weights(model))
    trial = trial and trial | {"device": device_name(model.device)}
    _write(model, folder, replace(facts, trial=trial, has_old_policy=False))


def _write(model: PreTrainedModel, folder: Path, facts: CardFacts) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = as_stored(facts)
    counts = exit_counts(model) if task_of(model).exits_early else None
    curves = _anytime_curves(model, facts, counts[0]) if counts else {}
    has_picture = bool(curves) and find_spec("matplotlib") is not None
    if has_picture:
        plot_curves(curves, str(folder / PICTURE), task_of(model).metric.replace("_", " "))
    values = template_values(model, facts, counts, PICTURE if has_picture else None)
    card = ModelCard.from_template(card_metadata(model, facts), template_path=str(_TEMPLATE), **values)
    save_card(card, facts, folder)


def _anytime_curves(model: PreTrainedModel, facts: CardFacts, costs: list[int]) -> dict[str, list[dict[str, float]]]:
    """Return a curve per evaluated dataset, by its name in the legend."""
    sets = {"single exits": facts.metrics} | {result["name"]: result["metrics"] for result in facts.results}
    found = {name: exit_scores(model, metrics) for name, metrics in sets.items()}
    return {
        name: [{"share": cost / costs[-1], "accuracy": scores[f"exit {exit}"]} for exit, cost in enumerate(costs)]
        for name, scores in found.items()
        if len(costs) > 1 and scores
    }


def card_metadata(model: PreTrainedModel, facts: CardFacts) -> ModelCardData:
    """Return the Hub's metadata of a card: the library that loads the model, its tags, and a result per exit."""
    task = task_of(model)
    metric = task.metric
    sets = [(None, facts.metrics), *((result["name"], result["metrics"]) for result in facts.results)]
    found = [(split, name, score) for split, metrics in sets for name, score in exit_scores(model, metrics).items()]
    # The Hub refuses results without a dataset.
    has_dataset = facts.dataset or facts.dataset_tags
    results = [
        EvalResult(
            task_type=task.pipeline_tag,
            dataset_type=[*facts.dataset_tags, facts.dataset][0],
            dataset_name=facts.dataset or facts.dataset_tags[0],
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')} ({name})",
            metric_value=round(score, 4),
        )
        for split, name, score in (found if has_dataset else ())
    ]
    return ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="peft" if is_adapter(model) else "transformers",
        pipeline_tag=task.pipeline_tag,
        tags=[*model.model_tags, *(method["name"] for method in facts.methods), *facts.tags],
        datasets=list(facts.dataset_tags) or None,
        base_model=facts.base_model,
        metrics=[metric] if found else None,
        eval_results=results or None,
        model_name=facts.name if results else None,
    )
