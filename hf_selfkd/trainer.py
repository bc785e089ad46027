"""A transformers Trainer that adds up the terms of a self-distillation method."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PredictionOutput, has_length

from .averaging import WeightAverage
from .card_trainer import CardTrainer
from .checkpoints import (
    AVERAGE_NAME,
    SCAFFOLD_NAME,
    check_method,
    load_scaffold,
    load_state,
    save_method,
    save_state,
)
from .functional import add, cross_entropy, smooth_labels
from .hub_trainer import HubTrainer
from .methods import Method, get_method
from .metrics import compute_exit_metrics, reduce_to_exit_metrics
from .outputs import MultiExitOutput
from .seeding import SeededDataset


class SelfDistillationTrainer(HubTrainer, CardTrainer):
    """Train a multi-exit model with a self-distillation method.

    Everything that :class:`transformers.Trainer` takes and does stays as it is. Each term of the method is logged as
    ``loss/<term>``; they add up to ``loss``. Evaluation reports ``eval_loss`` and ``eval_accuracy`` of the deepest
    exit, ``eval_loss_exit_<i>`` and ``eval_accuracy_exit_<i>`` of every exit from 0, shallow to deep, and
    ``eval_accuracy_ensemble``, of the mean of all logits, with ``calibration_error`` beside every accuracy; for
    segmentation ``mean_iou`` and ``pixel_accuracy`` in the place of ``accuracy``. ``labels`` of segmentation are maps
    of class indices, in which ``config.semantic_loss_ignore_index`` is void.

    Every training sample is drawn under random states that depend on seed, epoch and index only, so that neither a
    resumed run nor the number of workers changes the augmentation.

    Args:
        model: A multi-exit model; ``None`` if ``model_init`` builds it.
        args: The stock ``TrainingArguments``.
        method: A method or the name of one.
        lr_milestones: Epochs after which the learning rate is multiplied by ``lr_gamma``; not empty, it replaces
            ``lr_scheduler_type`` (warm-up stays).
        lr_gamma: Factor of the learning rate at each milestone.
        decay_norms: Whether weight decay also acts on norms, biases and what timm lists in ``no_weight_decay()``, as
            it does in the papers' recipes with SGD.
        ema_decay: Decay of a moving average of the weights, in [0, 1); ``None`` for none. The average is what is
            evaluated and what the model holds after training.
        mix: Applied to ``(pixel_values, labels)`` of every training batch, on its device, such as torchvision's
            ``v2.MixUp``; labels become probabilities.
        card: What the run cannot know for its model card, such as ``{"dataset": "cifar10"}``: arguments of
            :func:`~hf_selfkd.card_facts.collect_facts`. ``save_model`` and ``push_to_hub`` write the card.
        compute_metrics: As in ``Trainer``, and then it sees the logits of all exits; ``None`` for the metrics above.
        kwargs: What ``Trainer`` takes.

    Raises:
        ValueError: If the model cannot be trained with the method.
    """

    # The terms are means per micro-batch, so the Trainer must divide by the accumulation steps.
    loss_is_scaled_for_ga = False

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
        compute_metrics=None,
        **kwargs,
    ):
        self.method = get_method(method) if isinstance(method, str) else method
        if not isinstance(self.method, Method):
            raise TypeError(f"method must be a name or a Method such as get_method('byot'), but got {method!r}.")
        self.lr_milestones = tuple(lr_milestones)
        self.lr_gamma = lr_gamma
        self.decay_norms = decay_norms
        self.mix = mix
        self._terms: dict[str, Tensor] = defaultdict(lambda: 0.0)
        self._term_steps = 0.0
        args = TrainingArguments() if args is None else args
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter gets a gradient in every step
        if model is not None:
            self._attach_method(model, args)
        if compute_metrics is None:
            if args.batch_eval_metrics:
                raise ValueError(
                    "batch_eval_metrics needs your own compute_metrics. Leave it out: ours needs no logits."
                )
            compute_metrics = compute_exit_metrics
            kwargs.setdefault("preprocess_logits_for_metrics", reduce_to_exit_metrics)
        super().__init__(model=model, args=args, compute_metrics=compute_metrics, card=card, **kwargs)
        self.average = None if ema_decay is None else WeightAverage(ema_decay)
        self.add_callback(_Preparation(self))
        if self.average is not None:
            self.add_callback(self.average)

    def _attach_method(self, model: nn.Module, args: TrainingArguments) -> None:
        if not hasattr(model, "num_exits"):
            raise ValueError(
                f"SelfDistillationTrainer needs a multi-exit model, but got {type(model).__name__}. "
                "Build one with MultiExitForImageClassification.from_backbone."
            )
        self.method.check(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("No parameter is left to train: the backbone is frozen and the model has no exits.")
        if model.task == "image-segmentation" and (args.label_smoothing_factor or self.mix is not None):
            raise ValueError(
                "label_smoothing_factor and mix are for image classification, but the model is one for segmentation. "
                "Leave them out."
            )
        torch.manual_seed(args.seed)  # the scaffold starts equal on all processes
        model.add_model_tags(self.method.name.split("+"))
        model.detach_exits = self.method.detach_exits
        model.scaffold = self.method.scaffold(model)

    def call_model_init(self, trial=None) -> nn.Module:
        """Build the model with ``model_init``, for each trial of a search, and give it the method's scaffold."""
        model = super().call_model_init(trial)
        self._attach_method(model, self.args)
        return model

    # The loss

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Add up the method's terms in training; in evaluation return the deepest exit's cross-entropy."""
        if not {"pixel_values", "labels"} <= inputs.keys():
            raise ValueError(
                f"A batch must hold pixel_values and labels, but this one holds {', '.join(inputs)}. Name the columns "
                "so in the data set or in a data_collator."
            )
        images, labels = inputs["pixel_values"], inputs["labels"]
        if not self.model.training:
            output = model(images, labels=labels)  # labels: all exits answer, whatever config.early_exit says
            loss = cross_entropy(output.exit_logits[-1], labels)
            return (loss, output) if return_outputs else loss
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        if self.args.label_smoothing_factor:
            labels = smooth_labels(labels, self.model.config.num_labels, self.args.label_smoothing_factor)
        output = model(images)
        terms = self.loss_terms(output, labels)
        self._track({f"loss/{name}": term for name, term in terms.items()} | self.method.metrics(output))
        loss = add(terms.values())
        return (loss, output) if return_outputs else loss

    def loss_terms(self, output: MultiExitOutput, labels: Tensor) -> dict[str, Tensor]:
        """Return the method's terms, and ``exits`` for exits that learn from detached maps."""
        terms = self.method(output, labels, self.state.epoch or 0.0)
        if self.model.detach_exits and len(output.exit_logits) > 1:
            terms["exits"] = add(cross_entropy(logits, labels) for logits in output.exit_logits[:-1])
        return terms

    def _track(self, terms: dict[str, Tensor]) -> None:
        share = 1 / self.current_gradient_accumulation_steps
        self._term_steps += share
        for name, term in terms.items():
            self._terms[name] = self._terms[name] + share * term.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of every term over steps and processes beside ``loss``."""
        if "loss" in logs and self._term_steps:
            for name, value in self._terms.items():
                value = self.accelerator.gather(value.to(self.args.device).float()).mean().item()
                logs[name] = value / self._term_steps
            self._terms.clear()
            self._term_steps = 0.0
        super().log(logs, start_time)

    # The recipe

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Create the scheduler; ``lr_milestones`` are in epochs."""
        if self.lr_scheduler is None and self.lr_milestones:
            if not has_length(self.train_dataset):
                raise ValueError(
                    "lr_milestones are in epochs, but the training data has no length. Use lr_scheduler_type, or data "
                    "with a length."
                )
            epochs = self.args.num_train_epochs if self.args.max_steps <= 0 else self.state.num_train_epochs
            milestones = [round(epoch * num_training_steps / epochs) for epoch in self.lr_milestones]
            warmup_steps = self.args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                warmup = min(1.0, (step + 1) / (warmup_steps + 1))
                return warmup * self.lr_gamma ** sum(step >= milestone for milestone in milestones)

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """List the parameters that weight decay acts on, by timm's convention unless ``decay_norms``."""
        if self.decay_norms:
            return [name for name, _ in model.named_parameters()]
        excluded = {f"backbone.{name}" for name in getattr(model.backbone, "no_weight_decay", set)()}
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and not name.endswith(".bias") and name not in excluded
        ]

    # Data

    def _prepare_inputs(self, inputs):
        """Move a batch to the device; void pixels of label maps become -100."""
        inputs = super()._prepare_inputs(inputs)
        labels = inputs.get("labels")
        if labels is not None and labels.dim() == 3:
            void = labels == self.model.config.semantic_loss_ignore_index
            inputs["labels"] = labels.long().masked_fill(void, -100)
        return inputs

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__") and has_length(dataset):
            config = self.model.config
            dataset = SeededDataset(
                dataset, self.args.seed, config.num_labels, description.lower(), config.semantic_loss_ignore_index
            )
            if kwargs.get("is_training"):
                self._seeded_dataset = dataset
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    # Evaluation

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate the averaged weights if there are any, with batch-norm statistics that agree on all processes."""
        self._synchronise_batch_norm()
        with self.average.applied_to(self.model) if self.average and self.is_in_train else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def predict(self, *args, **kwargs) -> PredictionOutput:
        """Predict; ``predictions`` holds the logits, and a tuple with those of every exit."""
        reduce, self.preprocess_logits_for_metrics = self.preprocess_logits_for_metrics, None
        try:
            return super().predict(*args, **kwargs)
        finally:
            self.preprocess_logits_for_metrics = reduce

    def _synchronise_batch_norm(self) -> None:
        if self.args.world_size > 1 and self.is_in_train:
            distribute_bn(self.model, self.args.world_size, reduce=True)

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        self._synchronise_batch_norm()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; into a checkpoint also what only trains, the averaged weights and the method's name."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:  # called by _save_checkpoint
            save_method(output_dir, self.method.name)
            if self.model.scaffold is not None:
                save_state(self.model.scaffold.state_dict(), output_dir, SCAFFOLD_NAME)
            if self.average is not None:
                save_state(self.average.state_dict(), output_dir, AVERAGE_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_method(resume_from_checkpoint, self.method.name)
        with self._without_scaffold():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.model.scaffold is not None:
            load_scaffold(self.model.scaffold, resume_from_checkpoint)
        if self.average is not None:
            self.average.start = load_state(resume_from_checkpoint, AVERAGE_NAME, "ema_decay")

    def _load_best_model(self) -> None:
        with self._without_scaffold():
            super()._load_best_model()
        if self.average is not None:
            self.average.final = load_state(self.state.best_model_checkpoint, AVERAGE_NAME, "ema_decay")

    @contextmanager
    def _without_scaffold(self) -> Iterator[None]:
        """Take the scaffold off while the weights are loaded: it is not in their file."""
        scaffold, self.model.scaffold = self.model.scaffold, None
        try:
            yield
        finally:
            self.model.scaffold = scaffold


class _Batches:
    """Batches of a data loader, on the trainer's device; each loop over them starts anew."""

    def __init__(self, trainer: SelfDistillationTrainer, dataloader):
        self.trainer = trainer
        self.dataloader = dataloader

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.trainer._prepare_inputs(batch) for batch in self.dataloader)


class _Preparation(TrainerCallback):
    """Tells the data which epoch it is, and prepares the scaffold of a fresh run."""

    def __init__(self, trainer: SelfDistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            model = self.trainer.model
            model.eval()
            with torch.no_grad():
                self.trainer.method.prepare(model, _Batches(self.trainer, kwargs["train_dataloader"]))

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.trainer, "_seeded_dataset"):
            self.trainer._seeded_dataset.epoch.fill_(int(state.epoch or 0))
