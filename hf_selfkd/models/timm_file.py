"""Files of weights that timm loads by ``checkpoint_path``, and the configuration that timm writes next to them."""

import json
import os
from typing import Any

from timm.models import get_pretrained_cfg, load_state_dict

# Fields of timm's configuration that describe images and labels.
_DATA = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")


def check_folder(folder: str) -> dict[str, Any]:
    """Return the configuration in a folder, empty if there is none.

    Raises:
        ValueError: If the folder holds a multi-exit model.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        fields = json.load(file)
    if fields.get("model_type") == "multi_exit":
        raise ValueError(
            f"{folder} holds a multi-exit model, not a timm model. Load it with from_pretrained({folder!r}); other "
            "classes are built with num_labels=..., ignore_mismatched_sizes=True."
        )
    return fields


def data_of(path: str, architecture: str) -> dict[str, Any]:
    """Return the fields of timm's ``pretrained_cfg`` that the folder of a file of weights holds for its data.

    Args:
        path: The file.
        architecture: Name of the timm model that it is loaded into; a folder of another one is not read.
    """
    fields = check_folder(os.path.dirname(os.path.abspath(path)))
    if fields.get("architecture") != architecture:
        return {}
    known = fields.get("pretrained_cfg", {}) | {key: fields[key] for key in ("label_names",) if fields.get(key)}
    return {key: known[key] for key in _DATA if known.get(key) is not None}


def count_classes(path: str, architecture: str) -> int | None:
    """Return the number of classes of the classifier in a file of weights, ``None`` if it has no classifier."""
    cfg = get_pretrained_cfg(architecture, allow_unregistered=True)
    classifier = getattr(cfg, "classifier", None)
    classifier = classifier[0] if isinstance(classifier, (list, tuple)) else classifier
    weight = load_state_dict(path, weights_only=True).get(f"{classifier}.weight")
    return None if weight is None else weight.shape[0]
