"""The sections of a model card, each as Markdown."""

import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..evaluation.curves import to_table
from ..methods import Method
from ..methods.combination import Combination
from ..models.exit_policy import ExitPolicy
from .facts import CardFacts, changed_hyper_parameters, commit, machine, versions

_BIBLIOGRAPHY = (Path(__file__).parent / "citations.bib").read_text(encoding="utf-8").strip().split("\n\n")
_TEMPERATURE_SCALING = "https://arxiv.org/abs/1706.04599"
_LEARN_THEN_TEST = "https://arxiv.org/abs/2110.01052"

_SNIPPETS = {
    "image-classification": """from transformers import pipeline

classify = pipeline("image-classification", model="{repository}", trust_remote_code=True)
for answer in classify("photo.png"):
    print(answer["label"], answer["score"])""",
    "image-segmentation": """from transformers import pipeline

segment = pipeline("image-segmentation", model="{repository}", trust_remote_code=True)
for answer in segment("photo.png"):
    print(answer["label"], answer["mask"].size)""",
}

_CRITERIA = {
    "confidence": "the largest softmax probability",
    "entropy": "one minus the entropy of the softmax, as a share of the largest possible",
    "margin": "the distance between the two largest softmax probabilities",
    "patience": "how many exits before it in a row gave the same answer",
}


def summarise(model: PreTrainedModel, facts: CardFacts) -> str:
    """Say in a sentence or two what the model is."""
    config = model.config
    is_classifier = model.task == "image-classification"
    kind = "An image classifier" if is_classifier else "A semantic segmentation model"
    options = f" with `{json.dumps(config.backbone_kwargs)}`" if config.backbone_kwargs else ""
    size = "x".join(str(side) for side in config.pretrained_cfg["input_size"])
    stem = f"{' and' if options else ' with'} a 3x3 stride-1 stem" if config.small_input_stem else ""
    text = f"{kind} for images of {size}: timm's `{config.backbone}`{options}{stem}"
    if model.num_exits > 1:
        stages = _spoken([str(stage) for stage in model.exit_stages])
        head = "its own head" if is_classifier else "the head of a feature pyramid"
        text += (
            f". It has {model.num_exits} exits, each of which answers by itself: behind stage"
            f"{'s' if model.num_exits > 2 else ''} {stages} and, the deepest, {head}"
        )
    data = facts.dataset or _spoken(facts.dataset_tags)
    return f"{text}.{f' Trained on {data}.' if facts.recipe and data else ''}"


def _spoken(words: Sequence[str]) -> str:
    *early, last = words or [""]
    return f"{', '.join(early)} and {last}" if early else last


def describe_use(model: PreTrainedModel, repository: str) -> str:
    """Show how to ask the model about an image."""
    is_classifier = model.task == "image-classification"
    auto_class = f"AutoModelFor{'ImageClassification' if is_classifier else 'SemanticSegmentation'}"
    return (
        f"```python\n{_SNIPPETS[model.task].format(repository=repository)}\n```\n\n"
        "This takes torch, timm and transformers. Where `hf_selfkd` is installed, `import hf_selfkd` replaces "
        f"`trust_remote_code=True`. `{auto_class}` loads the model itself, which answers with `logits` and, unless it "
        "exits early, `exit_logits` of all exits, shallow to deep."
    )


def describe_results(
    model: PreTrainedModel,
    facts: CardFacts,
    rows: Sequence[dict[str, Any]],
    picture: str | None,
    latency_runs: int,
) -> str:
    """Return the table of exits, what its numbers mean, and the anytime curve.

    Args:
        model: A multi-exit model.
        facts: What is known beside it.
        rows: One per exit, and that of the ensemble.
        picture: Name of the curve's file, if there is one.
        latency_runs: Runs that milliseconds are the median of, 0 if they were not measured.
    """
    words = []
    if {"accuracy (%)", "mean IoU (%)"} & rows[0].keys():
        amount = f"{facts.num_eval_images:,} images" if facts.num_eval_images else "the evaluation images"
        data = f" of {facts.dataset}" if facts.dataset else ""
        precision = next((f" in {name}" for name in ("bf16", "fp16") if facts.recipe.get(name)), "")
        words.append(f"Evaluated on {amount}{data}{precision}.")
    if rows[-1]["exit"] == "ensemble":
        words.append("The ensemble is the mean of all exits' logits.")
    if "million multiply-adds" in rows[0]:
        words.append("Multiply-adds and parameters are those that an image has met when it leaves at the exit.")
    else:
        shipped = sum(tensor.numel() for name, tensor in model.named_parameters() if not name.startswith("scaffold."))
        words.append(f"The model has {shipped / 1e6:.3f} million parameters.")
    if latency_runs:
        precision = str(model.dtype).removeprefix("torch.")
        words.append(
            f"Milliseconds are those until a single image can leave, the median of {latency_runs} runs in {precision} "
            f"on {machine(model.device)}."
        )
    parts = [to_table(rows)] if len(rows[0]) > 1 else []
    parts.append(" ".join(words))
    if picture is not None:
        parts.append(f"![Accuracy of each exit against its share of the full cost]({picture})")
    return "\n\n".join(parts)


def describe_policy(model: PreTrainedModel, trial: dict[str, Any] | None = None, *, is_old: bool = False) -> str:
    """Say when images leave early, how that was found, and what it guarantees.

    Args:
        model: A multi-exit model for classification.
        trial: What ``config.exit_policy`` was worth on images that it was not calibrated on: ``num_images``,
            ``accuracy`` and ``cost``, a share of the full cost, and ``full_accuracy`` of the deepest exit; with
            ``images_per_second`` and ``plain_images_per_second`` of ``batch_size`` images at once, if they were
            measured; and ``picture``, the name of a file beside the card.
        is_old: Whether the weights were trained on since the policy was found.
    """
    if model.config.exit_policy is None:
        return (
            "The checkpoint has no exit policy, so all exits answer. `hf_selfkd.calibrate` finds one from the logits "
            "of all exits on labelled images."
        )
    policy = ExitPolicy.from_dict(model.config.exit_policy)
    is_patience = policy.criterion == "patience"
    thresholds = [
        "never" if limit > (exit if is_patience else 1) else limit or "always"
        for exit, limit in enumerate(policy.thresholds)
    ]
    rows = [
        {"exit": exit, "leaves from": threshold, "temperature": temperature}
        for exit, (threshold, temperature) in enumerate(zip([*thresholds, "always"], policy.temperatures, strict=True))
    ]
    scaled = "" if is_patience else ", after division of the logits by the exit's temperature"
    state = "leave early by themselves" if model.config.early_exit else "do so with `config.early_exit` set to true"
    parts = [
        f"An image leaves at the first exit where its {policy.criterion} is high enough: {_CRITERIA[policy.criterion]}"
        f"{scaled}. In eval mode `model(pixel_values)` and `pipeline` {state}.",
        to_table(rows),
        "It was calibrated before the last training: nothing is known of what it is worth with these weights."
        if is_old
        else _describe_calibration(policy, leaves_early=set(thresholds) != {"never"}),
        _describe_trial(model, trial) if trial else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _describe_calibration(policy: ExitPolicy, leaves_early: bool) -> str:
    record = policy.calibration or {}
    if not record.keys() >= {"demand", "samples", "expected_accuracy", "expected_cost", "full_accuracy"}:
        return ""
    demand = record["demand"]
    judges_labels = record.get("reference") != "deepest exit"
    score = "accuracy" if judges_labels else "agreement with the deepest exit"
    if "target_cost" in demand:
        wanted = f"the best accuracy within {demand['target_cost']:g} of the full cost"
    elif "max_accuracy_drop" in demand:
        wanted = f"the least cost with at most {_points(demand['max_accuracy_drop'])} of {score} lost"
    else:
        wanted = f"the least cost with a guarantee that at most {_points(demand['max_risk'])} of {score} are lost"
    text = f"Calibrated on {record['samples']:,} images for {wanted}."
    if not leaves_early:
        return f"{text} No setting met that, so nobody leaves early."
    text += (
        f" Expected from them: {score} {100 * record['expected_accuracy']:.2f} % at {record['expected_cost']:.3f} of "
        f"the full cost, against {100 * record['full_accuracy']:.2f} % of the deepest exit."
    )
    if "max_risk" in demand:
        text += (
            f"\n\nGuarantee: with probability {1 - demand['delta']:g} over the draw of those images, at most "
            f"{_points(demand['max_risk'])} of {score} are lost against the deepest exit on images drawn like them. "
            "It says nothing about data of another kind."
        )
    return text


def _points(share: float) -> str:
    return f"{100 * share:g} percentage point{'' if share == 0.01 else 's'}"


def _describe_trial(model: PreTrainedModel, trial: dict[str, Any]) -> str:
    text = (
        f"On {trial['num_images']:,} other images: accuracy {100 * trial['accuracy']:.2f} % at {trial['cost']:.3f} of "
        f"the full cost, against {100 * trial['full_accuracy']:.2f} % of the deepest exit."
    )
    if "images_per_second" in trial:
        text += (
            f" In batches of {trial['batch_size']} of them on {machine(model.device)}: "
            f"{trial['images_per_second']:.0f} images per second, where the backbone alone takes in "
            f"{trial['plain_images_per_second']:.0f}."
        )
    return text + (f"\n\n![Accuracy against mean cost]({trial['picture']})" if "picture" in trial else "")


def describe_training(facts: CardFacts) -> str:
    """Say how the model was trained: method, hyper-parameters, recipe, versions; nothing where it was not."""
    if not facts.recipe:
        return ""
    parts = [_describe_method(method) for method in methods_of(facts.method)]
    if changed := changed_hyper_parameters(facts.method) if facts.method is not None else {}:
        told = ", ".join(f"`{name}` {_written(value)}" for name, value in changed.items())
        parts.append(f"Hyper-parameters that differ from the defaults: {told}.")
    amount = f"Trained on {facts.num_train_images:,} images. " if facts.num_train_images else ""
    parts.append(f"{amount}Other settings are the defaults of transformers' `TrainingArguments`.")
    parts.append(to_table([{"setting": name, "value": _written(value)} for name, value in facts.recipe.items()]))
    told = ", ".join(f"{name} {version}" for name, version in versions().items())
    revision, _, changes = (commit() or "").partition("-")
    if revision:
        told += f", commit `{revision}` of the working directory{' with changes' if changes else ''}"
    return "\n\n".join([*parts, f"{told}."])


def _describe_method(method: Method) -> str:
    """Say what a method is in the words of its docstring's first line, and where it is written down."""
    summary = (inspect.getdoc(type(method)) or "").partition("\n")[0]
    if summary.startswith(f"{type(method).__name__}("):  # what a dataclass has that nobody documented
        summary = ""
    # The baseline follows no paper, whatever network it trains.
    source = f" {method.paper}" if method.paper not in summary and method.name != "none" else ""
    return f"Method `{method.name}`: {summary}{source}"


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_written(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def methods_of(method: Method | None) -> list[Method]:
    """Return the methods of a combination, or the one method there is."""
    if isinstance(method, Combination):
        return list(method.methods)
    return [] if method is None else [method]


def papers(method: Method | None, policy: dict[str, Any] | None) -> list[str]:
    """Return where the methods, and what calibrated the exit policy, are defined: URLs."""
    found = [part.paper for part in methods_of(method)]
    if policy is not None:
        found += [_TEMPERATURE_SCALING] if set(policy["temperatures"]) != {1.0} else []
        found += [_LEARN_THEN_TEST] if "max_risk" in ((policy.get("calibration") or {}).get("demand") or {}) else []
    return found


def cite(papers: Iterable[str]) -> str:
    """Return the BibTeX of the papers behind URLs, of those that are known."""
    entries = [entry for paper in dict.fromkeys(papers) for entry in _BIBLIOGRAPHY if f"{{{paper}}}" in entry]
    return "```bibtex\n" + "\n\n".join(entries) + "\n```" if entries else ""
