"""A transformers Trainer that evaluates every exit."""

from typing import Any

from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from ..evaluation.classification import compute_exit_metrics, reduce_to_exit_metrics


class MetricsTrainer(Trainer):
    """Computes the metrics of every exit, unless told which to compute.

    Args:
        args: What ``Trainer`` takes.
        compute_metrics: As in ``Trainer``; ``None`` for those of :mod:`hf_selfkd.metrics`.
        kwargs: What ``Trainer`` takes.

    Raises:
        ValueError: If ``args`` asks for ``batch_eval_metrics`` and there are no own metrics.
    """

    def __init__(self, *, args: TrainingArguments, compute_metrics=None, **kwargs):
        self._reduces_answers = compute_metrics is None and "preprocess_logits_for_metrics" not in kwargs
        if compute_metrics is None and args.batch_eval_metrics:
            raise ValueError("batch_eval_metrics needs your own compute_metrics. Leave it out: ours needs no logits.")
        super().__init__(args=args, compute_metrics=compute_metrics or compute_exit_metrics, **kwargs)

    def prediction_step(self, *args, **kwargs) -> tuple[Tensor | None, Any, Tensor | None]:
        """Reduce answers to what the metrics need before they, and maps of labels, are gathered and kept."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if self._reduces_answers and logits is not None and labels is not None:
            logits = reduce_to_exit_metrics(logits, labels)
            if labels.dim() == 3:
                labels = labels[:, :1, :1]  # says that they were maps, which nobody reads any more
        return loss, logits, labels

    def predict(self, *args, **kwargs) -> PredictionOutput:
        """Predict; ``predictions`` holds the logits, and a tuple with those of every exit.

        With ``preprocess_logits_for_metrics`` it holds what that makes of them.
        """
        reduces, self._reduces_answers = self._reduces_answers, False
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._reduces_answers = reduces
