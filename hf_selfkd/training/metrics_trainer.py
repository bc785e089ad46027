"""A transformers Trainer that evaluates every exit."""

from typing import Any

from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from ..tasks import task_of


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
        super().__init__(args=args, compute_metrics=compute_metrics or self._compute_exit_metrics, **kwargs)

    def prediction_step(self, *args, **kwargs) -> tuple[Tensor | None, Any, Tensor | None]:
        """Reduce answers to what the metrics need before they, and maps of labels, are gathered and kept."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if self._reduces_answers and logits is not None and labels is not None:
            logits = task_of(self.model).reduce_logits(logits[1], labels)
            # Trainer computes metrics only where there are labels; these are in the reduced logits already.
            labels = labels.reshape(len(labels), -1)[:, 0]
        return loss, logits, labels

    def _compute_exit_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        task, reduced = task_of(self.model), prediction.predictions
        if not self._reduces_answers:  # predict keeps all logits
            reduced = task.reduce_logits(reduced[1], prediction.label_ids)
        return task.compute_metrics(*reduced)

    def predict(self, *args, **kwargs) -> PredictionOutput:
        """Predict; ``predictions`` holds the logits, and a tuple with those of every exit.

        With ``preprocess_logits_for_metrics`` it holds what that makes of them.
        """
        reduces, self._reduces_answers = self._reduces_answers, False
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._reduces_answers = reduces
