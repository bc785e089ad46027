"""Files with the results per class, next to the card."""

import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from ..evaluation.per_class import plot_confusion, write_class_scores, write_confusion
from ..tasks import task_of
from .evaluations import Evaluation, name_of_set


def write_class_results(
    model: nn.Module, evaluations: Mapping[str, Evaluation], folder: str | Path
) -> list[dict[str, str | None]]:
    """Write the score of every class, and the confusion matrix of the final exit, of each evaluated dataset.

    The confusion matrix is drawn too where matplotlib is installed (``hf_selfkd[plots]``).

    Args:
        model: A multi-exit model.
        evaluations: Evaluations by the prefix of their metrics.
        folder: Folder of the card.

    Returns:
        For each dataset its ``name``, ``None`` for the only one, and the names of the files ``scores``, ``confusion``
        and ``picture``, ``None`` where it was not drawn; and the ``title`` of the scores.

    Warns:
        UserWarning: If an evaluation counted no classes.
    """
    counts = task_of(model).class_counts
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    Path(folder).mkdir(parents=True, exist_ok=True)
    found = []
    for prefix, evaluation in evaluations.items():
        if evaluation.confusion is None:
            warnings.warn(
                f"The results per class of the evaluation '{prefix}' are unknown. Give the trainer "
                "card={'per_class': True}, and call evaluate() before saving.",
                stacklevel=2,
            )
            continue
        name = name_of_set(prefix)
        suffix = "" if name is None else "_" + re.sub(r"\W+", "_", name)
        scores, confusion, picture = (
            f"{kind}{suffix}.{ending}"
            for kind, ending in (("per_class", "csv"), ("confusion_matrix", "csv"), ("confusion_matrix", "png"))
        )
        write_class_scores(counts, evaluation.confusion, names, Path(folder) / scores)
        final = evaluation.confusion[-2]  # the last is the ensemble's
        write_confusion(final, names, Path(folder) / confusion)
        has_picture = find_spec("matplotlib") is not None
        if has_picture:
            plot_confusion(final, names, Path(folder) / picture)
        files = {"scores": scores, "confusion": confusion, "picture": picture if has_picture else None}
        found.append({"name": name, "title": counts.title} | files)
    return found
