"""Reject labels that a model cannot learn from, with the index of the sample."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from ..tasks import Task

# Where the stock collator looks for the label of a sample.
LABEL_NAMES = ("labels", "label", "label_ids")


class LabelCheck(NamedTuple):
    """A check of the labels of a dataset.

    Args:
        task: Task of the model.
        config: Configuration of the model.
        name: Name of the data in errors, such as ``training``.
    """

    task: Task
    config: PreTrainedConfig
    name: str

    def __call__(self, index: int, sample: Any) -> Any:
        """Check the label of a sample, if it has one, and return the sample.

        The trainer reports which columns a batch lacks. Samples other than dictionaries need a collator of one's own,
        whose batches are checked.

        Raises:
            ValueError: If the task does not allow the label.
        """
        name = label_name(sample)
        if name is None:
            return sample
        label = sample[name]
        converted = self.convert([label], sample, f"Sample {index} of the {self.name} data")
        if name == "label" and getattr(label, "ndim", 0) > 0:
            # The stock collator takes a tensor or array of this name for a single number.
            return {key: value for key, value in sample.items() if key != name} | {"labels": label}
        if converted.dim() > 1 or isinstance(label, (int, Tensor)):
            return sample
        return {**sample, name: converted.item()}  # the stock collator takes some integers of numpy for floats

    def check_batch(self, batch: Any) -> None:
        """Check the labels of a batch, which a collator of one's own may have made.

        Raises:
            ValueError: As for a sample.
        """
        if isinstance(batch, Mapping) and "labels" in batch:
            self.convert(batch["labels"], batch)

    def convert(self, labels: Any, images: Mapping[str, Any] | None = None, name: str | None = None) -> Tensor:
        """Return labels as the task converts them.

        Args:
            labels: A batch of them.
            images: Their sample or batch, whose ``pixel_values`` they must suit.
            name: Begins the text of errors; ``None`` for the name of the data.

        Raises:
            ValueError: If the task does not allow the labels.
        """
        shape = getattr((images or {}).get("pixel_values"), "shape", None)
        size = None if shape is None else tuple(shape[-2:])
        return self.task.convert_labels(labels, self.config, name or f"A batch of the {self.name} data", size)


def label_name(sample: Any) -> str | None:
    """Return the name under which a sample has its label, ``None`` if it has none."""
    names = LABEL_NAMES if isinstance(sample, Mapping) else ()
    return next((name for name in names if name in sample), None)


class CheckedCollator:
    """Collate samples, and check the labels of the batch, in the worker, where no accelerator waits for it.

    Args:
        collate: Makes a batch from a list of samples.
        check: The check.
    """

    def __init__(self, collate: Callable[[list], Any], check: LabelCheck):
        self.collate = collate
        self.check = check

    def __call__(self, samples: list) -> Any:
        """Return the batch."""
        batch = self.collate(samples)
        self.check.check_batch(batch)
        return batch
