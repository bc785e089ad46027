"""A transformers Trainer that describes what it trained in a model card."""

from typing import Any

from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..model_card.card import write_model_card
from ..model_card.facts import Evaluation, collect_facts


class CardTrainer(Trainer):
    """Writes the model card in the place of the stock one, and remembers what the card will tell.

    Args:
        args: What ``Trainer`` takes.
        card: What the run cannot know for its card, arguments of :func:`~hf_selfkd.model_card.facts.collect_facts`.
        kwargs: What ``Trainer`` takes.
    """

    def __init__(self, *args, card: dict[str, Any] | None = None, **kwargs):
        self.card = card or {}
        given = (*kwargs.get("optimizers", ()), kwargs.get("optimizer_cls_and_kwargs"))
        self.has_own_optimizer = any(part is not None for part in given)
        self.policy_before_training: dict[str, Any] | None = None
        self._evaluation: Evaluation | None = None
        super().__init__(*args, **kwargs)

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as ``Trainer`` does; what was known of the weights as they were is void."""
        self._evaluation = None
        if self.model is not None:  # else model_init builds it for a trial
            self.policy_before_training = self.model.config.exit_policy
        return super().train(*args, **kwargs)

    def call_model_init(self, trial=None) -> PreTrainedModel:
        """Build the model with ``model_init``, and remember the exit policy it came with."""
        model = super().call_model_init(trial)
        self.policy_before_training = model.config.exit_policy
        return model

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """Evaluate as ``Trainer`` does, and remember what was found."""
        output = super().evaluation_loop(*args, **kwargs)
        if "eval_loss" in output.metrics:  # and not predict's
            self._evaluation = Evaluation(self.state.global_step, output.num_samples, output.metrics)
        return output

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._evaluation is not None:
            best = [log for log in self.state.log_history if log["step"] == self.state.best_global_step]
            metrics = {name: value for log in best for name, value in log.items() if name.startswith("eval_")}
            self._evaluation = self._evaluation._replace(step=self.state.global_step, metrics=metrics)

    @property
    def evaluation(self) -> Evaluation | None:
        """The last evaluation, if it was one of the weights as they are."""
        found = self._evaluation
        return found if found is not None and found.step == self.state.global_step else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as ``Trainer`` does, and its card; checkpoints have none."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and not (self.args.push_to_hub and output_dir is None):  # what was pushed has its card
            self._write_card(output_dir or self.args.output_dir)

    def create_model_card(self, **facts) -> None:
        """Write the model card into the output folder, see :func:`~hf_selfkd.model_card.card.write_model_card`.

        Args:
            facts: What the run cannot know, beside what was given as ``card``.
        """
        self._write_card(self.args.output_dir, **facts)

    def _write_card(self, folder: str, **facts) -> None:
        if self.is_world_process_zero():
            write_model_card(self.model, folder, collect_facts(self, folder, **(self.card | facts)))
