"""A transformers Trainer that adds up the terms of a self-distillation method."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..functional import add, counted_over_processes, label_loss
from ..methods import Method, get_method
from ..methods.base import multi_exit_model
from ..model_card.card import write_model_card
from ..model_card.facts import collect_facts
from ..tasks import task_of
from . import adapters, hub, label_losses, recipe, resume, settings
from .attachment import Attachment
from .batches import add_indices, checked_collator, prepare_batch, seeded
from .callbacks import CardRecorder, EmaWeights, PrepareScaffold, SaveAfterEpoch, SeedData
from .class_balance import ClassBalance
from .evaluating_trainer import EvaluatingTrainer
from .image_processing import adopt_image_processor, warn_about_size
from .label_callbacks import CheckLabels
from .learning_rates import LearningRates, check_learning_rates
from .loss_sums import LossSums
from .nonfinite import NonFiniteGuard
from .run_arguments import described
from .seeded_data import INDICES
from .sigterm import SaveOnSigterm
from .streaming import SeededStream, StreamPosition

# Overridden private methods of Trainer, and why; a test pins each. Only loss_sums touches private fields of Trainer.
PRIVATE_HOOKS = {
    "_get_train_sampler": "no argument of TrainingArguments samples by class",
    "_prepare_inputs": "uint8 images are normalised, and ignored pixels become -100, on the device",
    "_init_training_state": "a stream resumes where it was; a run that ended in mid-epoch takes no further step",
    "_get_output_dir": "a checkpoint is written aside ...",
    "_save_checkpoint": "... with the scaffold and the state of each process, and gets its name once it is complete",
    "_push_from_checkpoint": "no push before it has its name; code and processor files are pushed too",
    "_load_from_checkpoint": "refuses another network or method before loading, and loads the scaffold",
    "_load_best_model": "the scaffold is not in the file, and the averaged weights are in one of their own",
}


class SelfDistillationTrainer(LearningRates, EvaluatingTrainer):
    """Train a multi-exit model with a self-distillation method.

    Each term of the method is logged as ``loss/<term>``; they add up to ``loss``. Evaluation reports ``eval_loss`` and
    ``eval_accuracy`` of the final exit, ``eval_exit_<i>_loss`` and ``eval_exit_<i>_accuracy`` of every exit from 0,
    first to last, and ``eval_ensemble_accuracy``, of the mean of all logits, each with a ``calibration_error``; for
    segmentation ``mean_iou`` and ``pixel_accuracy`` over labelled pixels.

    Training samples are drawn under random states of seed, epoch and index only: neither resuming nor the number of
    workers changes the augmentation. ``uint8`` images are normalised on the device. A loss, a term or a gradient that
    is not finite stops all processes before the weights change. When training ends, what the method attached to the
    model comes off it; ``trainer.scaffold`` keeps the scaffold, and the next ``train()`` continues with it.

    Args:
        model: A multi-exit model, or a module that wraps one; ``None`` if ``model_init`` builds it.
        args: The stock ``TrainingArguments``, which are copied.
        method: A method or the name of one.
        lr_milestones: Epochs after which the learning rate is multiplied by ``lr_gamma``, instead of
            ``lr_scheduler_type`` (warm-up stays).
        lr_gamma: Factor of the learning rate at each milestone.
        decay_norms: Whether weight decay includes norms, biases and timm's ``no_weight_decay()``, as in the papers.
        exit_learning_rate: Learning rate of the heads of all exits, the final exit's classifier included; ``None`` for
            ``learning_rate``. Warm-up and schedule apply to both.
        layer_decay: Factor of the learning rate from each layer of the backbone to the one before it, in (0, 1], with
            the layers of timm's ``group_matcher``; ``None`` for one learning rate.
        ema_decay: Decay of a moving average of the weights, in [0, 1), which is evaluated and kept; ``None`` for none.
        mix: Applied to ``(pixel_values, labels)`` of every training batch, on its device, such as torchvision's
            ``v2.MixUp``, under random states of seed, step and process; labels become probabilities.
        card: Facts for the model card that the run does not hold, such as ``{"dataset": "cifar10"}``: arguments of
            :func:`~hf_selfkd.model_card.facts.collect_facts`. ``save_model`` and ``push_to_hub`` write the card.
        class_weights: Weights of the classes in every label term, one per class, or ``"balanced"`` for the inverse of
            their frequency in the training data. A term is the mean of weight times loss. Metrics stay unweighted.
        balanced_sampling: Whether to draw every class equally often, with replacement.
        max_skipped_batches: Number of batches with NaN or infinity that may be skipped; each counts as a step and is
            logged as ``skipped_batches``.
        save_on_sigterm: Whether SIGTERM saves a checkpoint at the end of the step and ends the process with status
            143. ``enable_jit_checkpoint`` enables it too.
        predict_all_exits: Whether ``predictions``, of ``predict`` and for ``compute_metrics``, are a tuple of the
            logits of every exit instead of the model's ``logits``, those of the final exit.
        kwargs: Further arguments of ``Trainer``. ``compute_metrics`` adds to the metrics above. ``compute_loss_func``
            is the label loss of every exit, see :func:`~hf_selfkd.training.label_losses.from_stock`. ``optimizers``
            must hold all parameters that train: call ``method.attach(model)`` before building one.

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
        exit_learning_rate: float | None = None,
        layer_decay: float | None = None,
        ema_decay: float | None = None,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        card: dict[str, Any] | None = None,
        class_weights: Sequence[float] | str | None = None,
        balanced_sampling: bool = False,
        max_skipped_batches: int = 0,
        save_on_sigterm: bool = False,
        predict_all_exits: bool = False,
        **kwargs,
    ):
        self.method = get_method(method) if isinstance(method, str) else method
        if not isinstance(self.method, Method):
            raise TypeError(f"method must be a name or a Method such as get_method('byot'), but got {method!r}.")
        args = TrainingArguments() if args is None else args
        settings.check_settings(args, card or {}, max_skipped_batches, has_milestones=bool(lr_milestones))
        self.lr_milestones, self.lr_gamma, self.decay_norms = tuple(lr_milestones), lr_gamma, decay_norms
        self.mix, self.card, self.predict_all_exits = mix, card or {}, predict_all_exits
        self.train_dataset = kwargs.get("train_dataset")
        optimizers = (*(kwargs.get("optimizers") or (None, None)), kwargs.get("optimizer_cls_and_kwargs"))
        settings.check_optimizers(optimizers, has_milestones=bool(lr_milestones), decay_norms=decay_norms)
        self.has_own_optimizer = any(part is not None for part in optimizers)
        self.exit_learning_rate, self.layer_decay = exit_learning_rate, layer_decay
        check_learning_rates(exit_learning_rate, layer_decay, has_own_optimizer=self.has_own_optimizer)
        self.label_loss = label_losses.from_stock(kwargs.get("compute_loss_func"), self)
        self.aside: str | None = None  # the folder of a checkpoint while it is written
        self.sums, self.stream_position, self.seed_data = LossSums(self), StreamPosition(), SeedData()
        self.nonfinite = NonFiniteGuard(self, max_skipped_batches)
        self.sigterm = SaveOnSigterm() if save_on_sigterm or args.enable_jit_checkpoint else None
        self.average = None if ema_decay is None else EmaWeights(ema_decay)
        self.restore, self.card_recorder = resume.RestoreProcess(self), CardRecorder()
        self.attachment = Attachment(self)
        if model is not None:
            self._attach_method(model, args, optimizers[0])
        super().__init__(model=model, args=described(settings.own_arguments(args), self), **kwargs)
        self.balance, self.label_checks = ClassBalance(self, class_weights, balanced_sampling), CheckLabels(self)
        adopt_image_processor(self.processing_class, self.network.config)
        hub.ensure_branch(self, self.args.hub_revision if self.args.push_to_hub else None)
        position = self.stream_position if isinstance(self.train_dataset, SeededStream) else None
        steps = (position, PrepareScaffold(self), self.seed_data, self.nonfinite, SaveAfterEpoch(), self.sigterm)
        others = (self.average, self.restore, self.card_recorder, hub.ReportPushes(self))
        for callback in filter(None, (self.label_checks, self.balance, *steps, *others)):
            self.add_callback(callback)

    @property
    def scaffold(self) -> nn.Module | None:
        """The modules used only in training, also when training has ended and they are no longer on the model."""
        return self.attachment.scaffold

    def call_model_init(self, trial=None) -> nn.Module:
        """Build the model with ``model_init``, for each trial of a search, and attach the method to it."""
        model = super().call_model_init(trial)
        if trial is not None and self.search_space is not None:
            self.method = self.search_space.method_of(trial)
        self._attach_method(model, self.args)
        adopt_image_processor(getattr(self, "processing_class", None), multi_exit_model(model).config)
        return model

    def _attach_method(self, model: nn.Module, args: TrainingArguments, optimizer=None) -> None:
        has = {"has_mix": self.mix is not None, "per_class": bool(self.card.get("per_class"))}
        settings.attach_method(self.method, model, args, data=self.train_dataset, optimizer=optimizer, **has)

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as ``Trainer`` does, and listen to SIGTERM if that is switched on."""
        with nullcontext() if self.sigterm is None else self.sigterm.listening(), self.attachment.on_the_model():
            return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Compute the gradients of a micro-batch; their norm is noted before ``max_grad_norm`` clips them."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.nonfinite.observe_gradient(model)
        return loss

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Add up the method's terms in training; in evaluation return the cross-entropy of the final exit."""
        if not {"pixel_values", "labels"} <= inputs.keys():
            raise ValueError(
                f"A batch needs pixel_values and labels, but has {', '.join(inputs)}. Name the columns so in the data."
            )
        images, labels = inputs["pixel_values"], inputs["labels"]
        self.label_checks.observe(labels)
        if self.model.training:
            loss, output = self._training_loss(model, images, labels)
        else:
            # With labels all exits run, whatever config.early_exit is.
            output = model(images, labels=labels, return_dict=True)
            with label_loss(None if self.compute_loss_func is None else self.label_loss):
                loss = output.label_loss(output.exit_logits[-1], labels)
        return (loss, output) if return_outputs else loss

    def _training_loss(self, model: nn.Module, images: Tensor, labels: Tensor):
        images, labels = recipe.mixed(self, images, labels)
        output = replace(model(images, return_dict=True), sample_indices=self._indices)
        with counted_over_processes(), label_loss(self.label_loss) as losses:
            terms = self.method.terms(output, labels, self.state.epoch or 0.0)
        label_losses.check_used(losses, self)
        self.method.remember(output)
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

    def set_initial_training_values(self, args, dataloader):
        """Turn epochs of a stream into steps; the stock trainer cannot, because each process has its own number."""
        args = recipe.measured_in_steps(self, args) if isinstance(self.train_dataset, SeededStream) else args
        return super().set_initial_training_values(args, dataloader)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        self.restore.checkpoint = resume_from_checkpoint
        self.sums.reset()  # of a training that was interrupted
        counts = (max_steps, num_update_steps_per_epoch, num_train_epochs)
        begun = super()._init_training_state(*counts, resume_from_checkpoint, trial)
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # the stock loop would take one more step where the run ended in mid-epoch
        if self.stream_position.loader is None or self.state.global_step == 0:
            return begun
        return self.stream_position.resume(self.state, skips_data=not self.args.ignore_data_skip), 0

    def get_train_dataloader(self):
        """Return the training loader; in training its batches have sample indices, unless the data is a stream."""
        steps = self.args.gradient_accumulation_steps
        batch_size = self.get_total_train_batch_size(self.args) // (steps * self.args.world_size)
        data = seeded(self.train_dataset, self, "training", batch_size)
        checked = checked_collator(self, "training")
        with resume.uncompiled(self), settings.swapped(self, train_dataset=data, **checked):
            loader = super().get_train_dataloader()
        self.seed_data.follow(data)
        stream = self.stream_position.follow(data, loader, steps)
        return stream or (add_indices(loader) if self.is_in_train else loader)

    def _get_train_sampler(self, train_dataset=None):
        return self.balance.sampler() or super()._get_train_sampler(train_dataset)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        self._indices = inputs.pop(INDICES, None)
        warn_about_size(inputs.get("pixel_values"), self)
        prepare_batch(inputs, task_of(self.network), self.network.config)
        return inputs

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
        with resume.inference_weights(self), adapters.card_kept(self, output_dir or self.args.output_dir):
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
