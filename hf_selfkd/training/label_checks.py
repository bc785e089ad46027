"""Reject labels that a model cannot learn from, with the index of the sample."""

from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..tasks import Task


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

    def __call__(self, index: int, sample: dict[str, Any]) -> None:
        """Check the label of a sample, if it has one: the trainer reports which columns a batch needs.

        Raises:
            ValueError: If the task does not allow the label.
        """
        name = next((name for name in ("labels", "label") if name in sample), None)  # the stock collator takes either
        if name is not None:
            self.task.check_label(sample[name], sample, self.config, f"Sample {index} of the {self.name} data")
