"""A Trainer that evaluates every exit, and searches hyper-parameters by the result."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalLoopOutput

from ..evaluation.per_class import ConfusionMatrices
from ..methods.base import multi_exit_model
from ..model_card.evaluations import Evaluation
from ..models.outputs import as_tuples
from ..tasks import task_of
from . import hyper_parameters, resume
from .batches import checked_collator, seeded
from .settings import swapped


class EvaluatingTrainer(Trainer):
    """What :class:`~hf_selfkd.SelfDistillationTrainer` does besides training: evaluation, prediction and search.

    The metrics of the exits come from a few numbers per image and exit; logits are gathered only for ``predict`` and
    for ``compute_metrics``.
    """

    exit_outputs: EvalLoopContainer | None = None  # during an evaluation: what the metrics of the exits need
    confusion: ConfusionMatrices | None = None  # likewise, if results per class are requested
    search_space: hyper_parameters.SearchSpace | None = None

    @property
    def network(self) -> nn.Module:
        """The multi-exit model in ``model``, which may wrap it."""
        return multi_exit_model(self.model)

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the evaluation loader; its samples are checked."""
        data = seeded(self.eval_dataset, self, "evaluation")
        with resume.uncompiled(self), swapped(self, eval_dataset=data, **checked_collator(self, "evaluation")):
            return super().get_eval_dataloader(seeded(eval_dataset, self, "evaluation"))

    def get_test_dataloader(self, test_dataset):
        """Return the test loader; its samples are checked."""
        with resume.uncompiled(self), swapped(self, **checked_collator(self, "test")):
            return super().get_test_dataloader(seeded(test_dataset, self, "test"))

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate as ``Trainer`` does, and add the metrics of every exit; own metrics of the same name prevail.

        In training the averaged weights are evaluated if there are any, with batch-norm statistics that agree on all
        processes.
        """
        if self.is_in_train:
            resume.synchronise_batch_norm(self)
        counts = task_of(self.network).class_counts if self.card.get("per_class") else None
        confusion = None if counts is None else ConfusionMatrices(counts, self.network.config.num_labels)
        averaged = self.average.applied_to(self.model) if self.average and self.is_in_train else nullcontext()
        every_exit = swapped(self.network.config, early_exit=False, return_dict=True)
        with averaged, every_exit, swapped(self, exit_outputs=EvalLoopContainer(), confusion=confusion):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            output.metrics.update(self._exit_metrics(output.metrics, f"{metric_key_prefix}_"))
        if description == "Evaluation":  # and not that of predict
            matrices = None if confusion is None else confusion.total
            evaluation = Evaluation(self.state.global_step, output.num_samples, output.metrics, matrices)
            self.card_recorder.record(metric_key_prefix, evaluation)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None) -> tuple[Any, Any, Any]:
        """Predict for a batch, and keep what the metrics of the exits need, without their logits."""
        ignored = self.network.config.keys_to_ignore_at_inference  # Trainer does not look inside a wrapped model
        loss, outputs, labels = super().prediction_step(model, inputs, self.args.prediction_loss_only, ignored)
        if outputs is None:
            return loss, None, None
        logits, exit_logits = as_tuples(outputs)
        if labels is not None and self.exit_outputs is not None:
            reduced = task_of(self.network).reduce_logits(exit_logits, labels)
            self.exit_outputs.add(self.gather_function(reduced))
            if self.confusion is not None:
                self.confusion.add(exit_logits, labels, self.gather_function)
            if self.args.eval_accumulation_steps is not None:
                self.exit_outputs.to_cpu_and_numpy()
        if prediction_loss_only:
            return loss, None, None
        return loss, exit_logits if self.predict_all_exits else logits, labels

    def _exit_metrics(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Return the metrics of the exits that are to be added to those of the stock loop, with a prefix."""
        reduced = self.exit_outputs.get_arrays()
        if reduced is None:  # no labels, or prediction_loss_only
            return {}
        found = {f"{prefix}{name}": value for name, value in task_of(self.network).compute_metrics(*reduced).items()}
        # The loop's loss is a mean of batches, which need not have equally many labelled images.
        replaced = {f"{prefix}loss"} if self.compute_loss_func is None else set()
        return {name: value for name, value in found.items() if name in replaced or name not in metrics}

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend=None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs,
    ):
        """Search hyper-parameters as ``Trainer`` does, by default for the largest ``eval_accuracy``.

        Args:
            hp_space: May also give hyper-parameters of the method by their names, such as ``alpha``; of a combination
                ``eed.temperature``.
            compute_objective: ``None`` for the headline metric of the final exit, ``eval_accuracy`` or, for
                segmentation, ``eval_mean_iou``.
            n_trials: As in ``Trainer``.
            direction: ``"maximize"`` for the default objective; with an objective of one's own ``"minimize"`` unless
                given, as in ``Trainer``.
            backend: As in ``Trainer``.
            hp_name: As in ``Trainer``.
            kwargs: As in ``Trainer``.

        Raises:
            ValueError: If ``direction`` contradicts the default objective, or a name in ``hp_space`` is neither in
                ``TrainingArguments`` nor a hyper-parameter of the method.
        """
        direction = hyper_parameters.direction_of(direction, compute_objective)
        objective = compute_objective or partial(hyper_parameters.headline_metric, self)
        space = None if hp_space is None else hyper_parameters.SearchSpace(hp_space, self)
        with swapped(self, search_space=space, method=self.method):
            return super().hyperparameter_search(space, objective, n_trials, direction, backend, hp_name, **kwargs)
