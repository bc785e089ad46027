"""A transformers Trainer that adds up the terms of a self-distillation method."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction, PredictionOutput, TrainOutput

from ..functional import add, counted_over_processes, cross_entropy
from ..methods import Method, get_method
from ..methods.base import multi_exit_model
from ..model_card.card import write_model_card
from ..model_card.facts import Evaluation, collect_facts
from ..tasks import task_of
from . import hub, recipe, resume, settings
from .batches import add_indices, prepare_batch, seeded
from .callbacks import CardRecorder, EmaWeights, PrepareScaffold, SaveAfterEpoch, SeedData
from .loss_sums import LossSums
from .nonfinite import NonFiniteGuard
from .seeded_data import INDICES
from .sigterm import SaveOnSigterm
from .streaming import SeededStream, StreamPosition

# Overridden private methods of Trainer, and why; a test pins each. Only loss_sums touches private fields of Trainer.
PRIVATE_HOOKS = {
    "_prepare_inputs": "uint8 images are normalised, and ignored pixels become -100, on the device",
    "_init_training_state": "a stream resumes where it was; a run that ended in mid-epoch takes no further step",
    "_get_output_dir": "a checkpoint is written aside ...",
    "_save_checkpoint": "... with the scaffold and the state of each process, and gets its name once it is complete",
    "_push_from_checkpoint": "no push before it has its name; code and processor files are pushed too",
    "_load_from_checkpoint": "refuses another network or method before loading, and loads the scaffold",
    "_load_best_model": "the scaffold is not in the file, and the averaged weights are in one of their own",
}


class SelfDistillationTrainer(Trainer):
    """Train a multi-exit model with a self-distillation method.

    Each term of the method is logged as ``loss/<term>``; they add up to ``loss``. Evaluation reports ``eval_loss`` and
    ``eval_accuracy`` of the final exit, ``eval_exit_<i>_loss`` and ``eval_exit_<i>_accuracy`` of every exit from 0,
    first to last, and ``eval_ensemble_accuracy``, of the mean of all logits, each with a ``calibration_error``; for
    segmentation ``mean_iou`` and ``pixel_accuracy`` over labelled pixels.

    Training samples are drawn under random states of seed, epoch and index only: neither resuming nor the number of
    workers changes the augmentation. ``uint8`` images are normalised on the device. A loss, a term or a gradient that
    is not finite stops all processes before the weights change.

    Args:
        model: A multi-exit model, or a module that wraps one; ``None`` if ``model_init`` builds it.
        args: The stock ``TrainingArguments``, which are copied.
        method: A method or the name of one.
        lr_milestones: Epochs after which the learning rate is multiplied by ``lr_gamma``, instead of
            ``lr_scheduler_type`` (warm-up stays).
        lr_gamma: Factor of the learning rate at each milestone.
        decay_norms: Whether weight decay includes norms, biases and timm's ``no_weight_decay()``, as in the papers.
        ema_decay: Decay of a moving average of the weights, in [0, 1), which is evaluated and kept; ``None`` for none.
        mix: Applied to ``(pixel_values, labels)`` of every training batch, on its device, such as torchvision's
            ``v2.MixUp``, under random states of seed, step and process; labels become probabilities.
        card: Facts for the model card that the run does not hold, such as ``{"dataset": "cifar10"}``: arguments of
            :func:`~hf_selfkd.model_card.facts.collect_facts`. ``save_model`` and ``push_to_hub`` write the card.
        max_skipped_batches: Number of batches with NaN or infinity that may be skipped; each counts as a step and is
            logged as ``skipped_batches``.
        save_on_sigterm: Whether SIGTERM saves a checkpoint at the end of the step and ends the process with status
            143. ``enable_jit_checkpoint`` enables it too.
        compute_metrics: As in ``Trainer``, and then it sees the logits of all exits; ``None`` for the metrics above.
        kwargs: Further arguments of ``Trainer``.

    Raises:
        ValueError: If the model cannot be trained with the method, or a setting contradicts another.
        TypeError: If ``method`` is not a method, or ``card`` has an unknown key.
    """

    loss_is_scaled_for_ga = False  # terms are means per micro-batch: Trainer divides by the accumulation steps

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        method: str | Method = "byot",
        *,
        lr_milestones: Sequence[float] = (),
        lr_gamma: float = 0.1,
        decay_norms: bool = False,
        ema_decay: float | None = None,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        card: dict[str, Any] | None = None,
        max_skipped_batches: int = 0,
        save_on_sigterm: bool = False,
        compute_metrics=None,
        **kwargs,
    ):
        self.method = get_method(method) if isinstance(method, str) else method
        if not isinstance(self.method, Method):
            raise TypeError(f"method must be a name or a Method such as get_method('byot'), but got {method!r}.")
        args = TrainingArguments() if args is None else args
        settings.check_settings(args, card or {}, max_skipped_batches, has_own_metrics=compute_metrics is not None)
        self.lr_milestones, self.lr_gamma, self.decay_norms = tuple(lr_milestones), lr_gamma, decay_norms
        self.mix, self.card = mix, card or {}
        optimizers = (*kwargs.get("optimizers", ()), kwargs.get("optimizer_cls_and_kwargs"))
        self.has_own_optimizer = any(part is not None for part in optimizers)
        self.reduces_logits = compute_metrics is None and "preprocess_logits_for_metrics" not in kwargs
        self.aside: str | None = None  # the folder of a checkpoint while it is written
        self.sums, self.stream_position, self.seed_data = LossSums(self), StreamPosition(), SeedData()
        self.nonfinite = NonFiniteGuard(self, max_skipped_batches)
        self.sigterm = SaveOnSigterm() if save_on_sigterm or args.enable_jit_checkpoint else None
        self.average = None if ema_decay is None else EmaWeights(ema_decay)
        self.restore, self.card_recorder = resume.RestoreProcess(self), CardRecorder()
        if model is not None:
            settings.attach_method(self.method, model, args, has_mix=mix is not None)
        args, metrics = settings.own_arguments(args), compute_metrics or self._exit_metrics
        super().__init__(model=model, args=args, compute_metrics=metrics, **kwargs)
        hub.ensure_branch(self, self.args.hub_revision if self.args.push_to_hub else None)
        position = self.stream_position if isinstance(self.train_dataset, SeededStream) else None
        steps = (position, PrepareScaffold(self), self.seed_data, self.nonfinite, SaveAfterEpoch(), self.sigterm)
        others = (self.average, self.restore, self.card_recorder, hub.ReportPushes(self))
        for callback in filter(None, (*steps, *others)):
            self.add_callback(callback)

    @property
    def network(self) -> nn.Module:
        """The multi-exit model in ``model``, which may wrap it."""
        return multi_exit_model(self.model)

    def call_model_init(self, trial=None) -> nn.Module:
        """Build the model with ``model_init``, for each trial of a search, and attach the method to it."""
        model = super().call_model_init(trial)
        settings.attach_method(self.method, model, self.args, has_mix=self.mix is not None)
        return model

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as ``Trainer`` does, and listen to SIGTERM if that is switched on."""
        with nullcontext() if self.sigterm is None else self.sigterm.listening():
            return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Add up the method's terms in training; in evaluation return the cross-entropy of the final exit."""
        if not {"pixel_values", "labels"} <= inputs.keys():
            raise ValueError(
                f"A batch needs pixel_values and labels, but has {', '.join(inputs)}. Name the columns so in the data."
            )
        images, labels = inputs["pixel_values"], inputs["labels"]
        if self.model.training:
            loss, output = self._training_loss(model, images, labels)
        else:
            output = model(images, labels=labels)  # with labels all exits run, whatever config.early_exit is
            loss = cross_entropy(output.exit_logits[-1], labels)
        return (loss, output) if return_outputs else loss

    def _training_loss(self, model: nn.Module, images: Tensor, labels: Tensor):
        images, labels = recipe.mixed(self, images, labels)
        output = model(images)
        with counted_over_processes():
            terms = self.method.terms(output, labels, self.state.epoch or 0.0)
        loss = add(terms.values())
        named = {f"loss/{name}": term for name, term in terms.items()}
        self.sums.add(named | self.method.metrics(output), 1 / self.current_gradient_accumulation_steps)
        self.nonfinite.observe(named | {"loss": loss}, self._indices)
        self.seed_data.micro_step += 1
        return loss, output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log ``loss`` together with the mean of every term over steps and processes."""
        if "loss" in logs:
            logs.update(self.sums.pop_means())
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Create the scheduler, from ``lr_milestones`` if there are any."""
        is_given = self.lr_scheduler is not None and not isinstance(self.lr_scheduler, recipe.MilestoneLR)
        if self.lr_milestones and not is_given:  # every run has its own
            self.lr_scheduler = recipe.milestone_scheduler(self, num_training_steps, optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """List the parameters with weight decay, by timm's convention unless ``decay_norms``."""
        return [name for name, _ in model.named_parameters()] if self.decay_norms else recipe.decayed_parameters(model)

    def set_initial_training_values(self, args, dataloader):
        """Turn epochs of a stream into steps; the stock trainer cannot, because each process has its own number."""
        args = recipe.measured_in_steps(self, args) if isinstance(self.train_dataset, SeededStream) else args
        return super().set_initial_training_values(args, dataloader)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        self.restore.checkpoint = resume_from_checkpoint
        counts = (max_steps, num_update_steps_per_epoch, num_train_epochs)
        begun = super()._init_training_state(*counts, resume_from_checkpoint, trial)
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # the stock loop would take one more step where the run ended in mid-epoch
        if self.stream_position.loader is None or self.state.global_step == 0:
            return begun
        return self.stream_position.resume(self.state, skips_data=not self.args.ignore_data_skip), 0

    def get_train_dataloader(self):
        """Return the training loader; its batches have the indices of their samples, unless the data is a stream."""
        steps = self.args.gradient_accumulation_steps
        batch_size = self.get_total_train_batch_size(self.args) // (steps * self.args.world_size)
        data = seeded(self.train_dataset, self, "training", batch_size)
        with settings.swapped(self, train_dataset=data):
            loader = super().get_train_dataloader()
        self.seed_data.follow(data)
        return self.stream_position.follow(data, loader, steps) or add_indices(loader)

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the evaluation loader; its samples are checked."""
        with settings.swapped(self, eval_dataset=seeded(self.eval_dataset, self, "evaluation")):
            return super().get_eval_dataloader(seeded(eval_dataset, self, "evaluation"))

    def get_test_dataloader(self, test_dataset):
        """Return the test loader; its samples are checked."""
        return super().get_test_dataloader(seeded(test_dataset, self, "test"))

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        self._indices = inputs.pop(INDICES, None)
        prepare_batch(inputs, task_of(self.network), self.network.config)
        return inputs

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate the averaged weights if there are any, with batch-norm statistics that agree on all processes."""
        if self.is_in_train:
            resume.synchronise_batch_norm(self)
        with self.average.applied_to(self.model) if self.average and self.is_in_train else nullcontext():
            output = super().evaluation_loop(*args, **kwargs)
        self.card_recorder.record(Evaluation(self.state.global_step, output.num_samples, output.metrics))
        return output

    def prediction_step(self, *args, **kwargs) -> tuple[Tensor | None, Any, Tensor | None]:
        """Reduce logits to the inputs of the metrics before they are gathered and kept."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if self.reduces_logits and logits is not None and labels is not None:
            logits = task_of(self.network).reduce_logits(logits[1], labels)
            labels = labels.reshape(len(labels), -1)[:, 0]  # Trainer needs some, and the metrics none
        return loss, logits, labels

    def _exit_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        task, reduced = task_of(self.network), prediction.predictions
        if not self.reduces_logits:
            reduced = task.reduce_logits(reduced[1], prediction.label_ids)
        return task.compute_metrics(*reduced)

    def predict(self, *args, **kwargs) -> PredictionOutput:
        """Predict; ``predictions`` holds the logits and a tuple with those of every exit, unless preprocessed."""
        with settings.swapped(self, reduces_logits=False):
            return super().predict(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return self.aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        folder = self._get_output_dir(trial)
        with resume.saved_completely(self, folder):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(folder, f"checkpoint-{self.state.global_step}"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.aside is None:  # else it has not got its name yet
            hub.copy_loading_files(checkpoint_folder, self.args.output_dir)
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        resume.check_checkpoint(resume_from_checkpoint, self.network, self.method.name)
        with resume.inference_weights(self):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        resume.load_extras(self, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with resume.inference_weights(self):
            super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as ``Trainer`` does, and its card; checkpoints have none."""
        with resume.uncompiled(self):
            super().save_model(output_dir, _internal_call)
        if not _internal_call and not (self.args.push_to_hub and output_dir is None):  # pushing wrote the card
            self.create_model_card(folder=output_dir)

    def create_model_card(self, *, folder: str | None = None, **facts) -> None:
        """Write the model card into a folder, ``output_dir`` by default, with further facts than those in ``card``."""
        folder = folder or self.args.output_dir
        if self.is_world_process_zero():
            write_model_card(self.network, folder, collect_facts(self, folder, **(self.card | facts)))

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **facts
    ):
        """Save the model and its card in ``output_dir``, then upload both; a branch that does not exist is created."""
        if not self.args.push_to_hub:
            self.save_model(_internal_call=True)  # the repository is yet to be created, and that may fail
        if self.hub_model_id is None:
            if private is not None:
                self.args.hub_private_repo = private  # an argument of the stock method from transformers 5.23 only
            self.init_hf_repo(token=token)
        hub.ensure_branch(self, revision or self.args.hub_revision, token)
        return super().push_to_hub(commit_message, blocking, token, revision, **facts)
