"""Find a dataset by name or folder, its splits, its columns and its class names."""

from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
)
from PIL import Image as PILImage

from .arguments import HUB_DATASETS, DataArguments, EvaluationArguments, SplitArguments
from .bad_images import leave_out_bad_images
from .images import read_image, read_row

EVALUATION_SPLITS = ("test", "validation", "valid", "val")
# Up to this side in pixels images count as small ones, such as CIFAR's.
SMALL_SIDE = 48


def load_images(arguments: DataArguments, num_workers: int = 0) -> tuple[DatasetDict | IterableDatasetDict, list[str]]:
    """Load training and evaluation images, or open streams of them.

    Args:
        arguments: The options of the data.
        num_workers: Processes that look for bad images.

    Returns:
        The splits ``train`` and ``test`` with the columns ``image`` (encoded) and ``label``, and the class names.

    Raises:
        ValueError: If the data cannot be found or downloaded, its columns are ambiguous, or more images than allowed
            are unreadable.
    """
    if arguments.streaming:
        _refuse_for_streams(arguments)
    splits = _digits() if arguments.dataset == "digits" else _load(arguments.dataset, arguments.streaming)
    image, label = _find_columns(next(iter(splits.values())).features, arguments)
    chosen = choose_splits(splits, arguments, EVALUATION_SPLITS, label)
    chosen = limit_samples(chosen, arguments, label)
    names = {old: new for old, new in {image: "image", label: "label"}.items() if old != new}
    for name, split in chosen.items():
        split = split.select_columns([image, label]).rename_columns(names)
        chosen[name] = split.cast_column("image", Image(decode=False))
    if arguments.skip_bad_images:
        chosen["train"] = leave_out_bad_images(chosen["train"], read_row, arguments.skip_bad_images, num_workers)
    return chosen, _class_names(chosen, label)


def has_photos(arguments: EvaluationArguments) -> bool:
    """Find out whether a dataset holds photographs rather than small images such as CIFAR's, from its first images.

    Args:
        arguments: The options of the data.

    Raises:
        ValueError: If the data cannot be found or downloaded.
    """
    if arguments.dataset in ("cifar10", "cifar100", "digits"):
        return False
    if arguments.dataset == "imagenet-1k":
        return True
    rows = next(iter(_load(arguments.dataset, streaming=True).values()))
    column = _find_column(rows.features, arguments.image_column, Image, "image")
    encoded = (row[column] for row in rows.cast_column(column, Image(decode=False)))
    sides = [side for side in map(_largest_side, islice(encoded, 9)) if side]
    return bool(sides) and median(sides) > SMALL_SIDE


def _largest_side(encoded: dict) -> int | None:
    try:
        return max(read_image(encoded).size)
    except ValueError:  # training names such images, or leaves them out
        return None


def choose_splits(
    splits: DatasetDict,
    arguments: EvaluationArguments,
    evaluation_splits: tuple[str, ...],
    label: str | None = None,
) -> DatasetDict:
    """Return the splits ``train`` and ``test``.

    Args:
        splits: All splits.
        arguments: The options of the data.
        evaluation_splits: Names of the split to evaluate on, the preferred one first; one without labels is skipped.
        label: Column of the classes, which ``eval_share`` keeps in proportion; ``None`` for segmentation.

    Raises:
        ValueError: If a split is missing, or ``eval_share`` is given though there is a split to evaluate on.
    """
    if "train" not in splits:
        raise ValueError(f"{arguments.dataset} has the splits {', '.join(splits)}, but none called train.")
    labelled = _without_unlabelled(evaluation_splits, splits, arguments)
    accepted = [arguments.evaluation_split] if arguments.evaluation_split else labelled
    evaluation = next((name for name in accepted if name in splits), None)
    if arguments.eval_share is not None:
        if evaluation is not None:
            raise ValueError(f"--eval_share holds out training images, but there is a split {evaluation}: remove it.")
        return _hold_out(splits["train"], arguments.eval_share, label)
    if evaluation is None:
        raise ValueError(
            f"{arguments.dataset} has the splits {', '.join(splits)}, but none to evaluate on: "
            f"one of {', '.join(accepted)} is needed, or --eval_share 0.15 to hold out training images."
        )
    return type(splits)(train=splits["train"], test=splits[evaluation])


def _hold_out(rows: Dataset, share: float, label: str | None) -> DatasetDict:
    """Split the same images off every time, of each class as many as its share."""
    if not 0 < share < 1:
        raise ValueError(f"--eval_share must lie between 0 and 1, but got {share}.")
    column = label if label is not None and isinstance(rows.features[label], ClassLabel) else None
    return rows.train_test_split(share, seed=0, stratify_by_column=column)


def limit_samples(chosen: DatasetDict, arguments: SplitArguments, label: str | None = None) -> DatasetDict:
    """Cut the splits ``train`` and ``test`` to ``max_train_samples`` and ``max_eval_samples``.

    Args:
        chosen: The splits.
        arguments: The options of the data.
        label: Column of the classes; where each lies in one piece, as in class folders, rows are shuffled first.
    """
    for name, limit in (("train", arguments.max_train_samples), ("test", arguments.max_eval_samples)):
        if limit:
            rows = chosen[name]
            rows = rows.shuffle(seed=0) if label is not None and _is_grouped(rows, label) else rows
            chosen[name] = rows.select(range(min(limit, len(rows))))
    return chosen


def _without_unlabelled(names: tuple[str, ...], splits: DatasetDict, arguments: SplitArguments) -> list[str]:
    """Leave out the names of splits without labels, such as those that a benchmark wants predictions for."""
    try:
        column = _find_column(splits["train"].features, arguments.label_column, ClassLabel, "label")
    except ValueError:  # raised again when the columns are needed
        return list(names)
    return [name for name in names if name not in splits or _has_labels(splits[name], column)]


def _has_labels(rows: Dataset | IterableDataset, column: str) -> bool:
    """Whether any row has a class, or of a stream the first row; label maps are not read."""
    if column not in rows.features:
        return False
    if isinstance(rows.features[column], Image):
        return True
    labels = rows.select_columns([column])
    labels = labels.take(1) if isinstance(rows, IterableDataset) else labels
    return any(label not in (-1, None) for batch in labels.iter(1000) for label in batch[column])


def _is_grouped(rows: Dataset, label: str) -> bool:
    """Whether nearly all rows have the label of the one before."""
    labels = np.asarray(rows.select_columns(label).with_format("numpy")[:][label])
    return (labels[1:] != labels[:-1]).mean() < 0.1 if len(labels) > 1 else False


def _refuse_for_streams(arguments: DataArguments) -> None:
    for name in ("max_train_samples", "max_eval_samples", "skip_bad_images", "eval_share"):
        if getattr(arguments, name):
            raise ValueError(
                f"--{name} does not apply to streams, which are not read before training. Remove the option."
            )


def _load(name: str, streaming: bool) -> DatasetDict | IterableDatasetDict:
    if name not in HUB_DATASETS and not Path(name).is_dir():
        known = ", ".join([*HUB_DATASETS, "digits"])
        raise ValueError(f"--dataset takes {known} or an existing folder, but got {name!r}.")
    try:
        return load_dataset(HUB_DATASETS.get(name, name), streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        if name not in HUB_DATASETS:
            raise ValueError(f"The folder {name!r} holds neither parquet files nor images.") from error
        raise ValueError(
            f"{HUB_DATASETS[name]} could not be downloaded from the Hub ({error}). Without a network use --dataset "
            "digits, or --dataset with a local folder of parquet files or images."
        ) from error


def _digits() -> DatasetDict:
    """Return scikit-learn's handwritten digits: 1,797 real scans of 8x8 pixels, 360 of them for evaluation."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    pixels = (scans.reshape(-1, 8, 8) / 16 * 255).astype("uint8")
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = {"image": [PILImage.fromarray(scan) for scan in pixels], "label": labels.tolist()}
    return Dataset.from_dict(rows, features=features).train_test_split(360, seed=0, stratify_by_column="label")


def _find_columns(features: Features, arguments: DataArguments) -> tuple[str, str]:
    image = _find_column(features, arguments.image_column, Image, "image")
    label = _find_column(features, arguments.label_column, ClassLabel, "label")
    if image == label:
        raise ValueError(f"--image_column and --label_column both name {image!r}.")
    return image, label


def _find_column(features: Features, name: str | None, kind: type, role: str) -> str:
    if name is not None:
        if name not in features:
            raise ValueError(f"--{role}_column {name!r} is not among the columns: {', '.join(features)}.")
        if kind is Image and not isinstance(features[name], Image):
            raise ValueError(f"--{role}_column {name!r} does not hold images, but {features[name]}.")
        return name
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    named = [column for column in ("image", "img", "label", "labels") if column in features and role[:2] in column]
    if len(found) == 1:
        return found[0]
    if found == [] and len(named) == 1 and kind is ClassLabel:
        return named[0]
    if "fine_label" in found:  # CIFAR-100 has twenty superclasses in addition to the hundred classes
        return "fine_label"
    raise ValueError(
        f"{'No' if not found else 'More than one'} {role} column was found among {', '.join(features)}. "
        f"Name it with --{role}_column."
    )


def _class_names(splits: DatasetDict | IterableDatasetDict, column: str) -> list[str]:
    feature = splits["train"].features["label"]
    if isinstance(feature, ClassLabel):
        return feature.names
    if isinstance(splits, IterableDatasetDict):
        raise ValueError(f"Streams need class labels with their names, but column {column!r} holds {feature}.")
    labels = splits["train"].unique("label")
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"Column {column!r} must hold integers from 0 or class labels, but holds {labels[:3]}.")
    return [str(label) for label in range(max(labels) + 1)]
