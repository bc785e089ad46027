"""A transformers Trainer that adds up the terms of a self-distillation method."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from torchvision.transforms.v2.functional import normalize, to_dtype
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy, TrainOutput, has_length

from ..functional import add, counted_over_processes, cross_entropy, smooth_labels
from ..methods import Method, get_method
from .averaging import WeightAverage
from .card_trainer import CardTrainer
from .hub_trainer import HubTrainer
from .metrics_trainer import MetricsTrainer
from .preparation import Preparation
from .resuming import ResumableTrainer
from .safeguard import Safeguard
from .seeded_data import INDICES, IndexedCollator, SeededDataset, drawn_under
from .streaming import SeededStream, StreamingTrainer


class SelfDistillationTrainer(StreamingTrainer, ResumableTrainer, HubTrainer, CardTrainer, MetricsTrainer):
    """Train a multi-exit model with a self-distillation method.

    Everything that :class:`transformers.Trainer` takes and does stays as it is. Each term of the method is logged as
    ``loss/<term>``; they add up to ``loss``. Evaluation reports ``eval_loss`` and ``eval_accuracy`` of the deepest
    exit, ``eval_loss_exit_<i>`` and ``eval_accuracy_exit_<i>`` of every exit from 0, shallow to deep, and
    ``eval_accuracy_ensemble``, of the mean of all logits, with ``calibration_error`` beside every accuracy; for
    segmentation ``mean_iou`` and ``pixel_accuracy`` in the place of ``accuracy``. ``labels`` of segmentation are maps
    of class indices, in which ``config.semantic_loss_ignore_index`` is void.

    Every training sample is drawn under random states that depend on seed, epoch and index only, so that neither a
    resumed run nor the number of workers changes the augmentation.

    ``pixel_values`` of ``uint8``, whole numbers from 0 to 255, are normalised on the device, by mean and standard
    deviation in ``config.pretrained_cfg``: they load four times as fast as floats.

    SIGTERM saves a checkpoint at the end of the step and ends the process with status 143, unless ``save_strategy`` is
    ``"no"``. A loss, a term or a gradient that is not finite stops all processes before the weights change.

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
            ``v2.MixUp``; labels become probabilities. Each process mixes its own batch, under random states that
            depend on seed, step and process only.
        card: What the run cannot know for its model card, such as ``{"dataset": "cifar10"}``: arguments of
            :func:`~hf_selfkd.model_card.facts.collect_facts`. ``save_model`` and ``push_to_hub`` write the card.
        max_skipped_batches: Number of batches that may be left out in the whole run because of numbers that are not
            finite. Each counts as a step of the schedule and is logged as ``skipped_batches``.
        compute_metrics: As in ``Trainer``, and then it sees the logits of all exits; ``None`` for the metrics above.
        kwargs: What ``Trainer`` takes.

    Raises:
        ValueError: If the model cannot be trained with the method, or a setting contradicts another.
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
        max_skipped_batches: int = 0,
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
        self._micro_step = 0  # within the current step, which accumulates gradients
        args = TrainingArguments() if args is None else args
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter gets a gradient in every step
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False  # equal from the start; batch norm is averaged when it is needed
        args.logging_nan_inf_filter = False  # would read the loss twice a batch; the safeguard reads it once a step
        if args.fp16 and max_skipped_batches:
            raise ValueError("fp16 leaves out such batches by itself. Leave max_skipped_batches at 0, or use bf16.")
        self.safeguard = Safeguard(
            self, max_skipped_batches, args.save_strategy != SaveStrategy.NO or args.enable_jit_checkpoint
        )
        args.enable_jit_checkpoint = False  # saves within a step, from where no run goes on exactly
        if model is not None:
            self._attach_method(model, args)
        super().__init__(model=model, args=args, compute_metrics=compute_metrics, card=card, **kwargs)
        self.average = None if ema_decay is None else WeightAverage(ema_decay)
        self.add_callback(Preparation(self))
        self.add_callback(self.safeguard)
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
        self.method.attach(model)
        model.add_model_tags(self.method.name.split("+"))

    def call_model_init(self, trial=None) -> nn.Module:
        """Build the model with ``model_init``, for each trial of a search, and give it the method's scaffold."""
        model = super().call_model_init(trial)
        self._attach_method(model, self.args)
        return model

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as ``Trainer`` does, and listen to SIGTERM meanwhile."""
        with self.safeguard.listening():
            return super().train(*args, **kwargs)

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
            step = (self.state.global_step, self._micro_step)
            with drawn_under(self.args.seed, *step, self.args.process_index):
                images, labels = self.mix(images, labels)
        if self.args.label_smoothing_factor:
            labels = smooth_labels(labels, self.model.config.num_labels, self.args.label_smoothing_factor)
        output = model(images)
        with counted_over_processes():
            terms = self.method.terms(output, labels, self.state.epoch or 0.0)
        self._micro_step += 1
        named = {f"loss/{name}": term for name, term in terms.items()}
        self._track(named | self.method.metrics(output))
        loss = add(terms.values())
        self.safeguard.observe(named | {"loss": loss}, self._indices)
        return (loss, output) if return_outputs else loss

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

    def _get_grad_norm(self, model, grad_norm=None):
        kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        is_plain = self.accelerator.distributed_type in kinds and self.accelerator.scaler is None
        if grad_norm is None and is_plain and not self._has_mixed_mesh_grads(model):
            # The Trainer would clip to infinity, which multiplies all gradients by 1.
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # else a gradient that overflows is a search for the scale
            is_sharded = isinstance(grad_norm, DTensor)
            self.safeguard.grad_norm = grad_norm.full_tensor() if is_sharded else grad_norm
        return grad_norm

    # The recipe

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Create the scheduler; ``lr_milestones`` are in epochs."""
        if self.lr_scheduler is None and self.lr_milestones:
            if not has_length(self.train_dataset):
                raise ValueError(
                    "lr_milestones are in epochs, but the training data has no length. Use lr_scheduler_type, or data "
                    "with a length."
                )
            if isinstance(self.train_dataset, SeededStream):
                epochs = self.stream_epochs(num_training_steps)
            else:
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
        """Move a batch to the device; whole numbers are normalised, and void pixels of label maps become -100."""
        inputs = super()._prepare_inputs(inputs)
        if "pixel_values" in inputs and inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = self._normalise(inputs["pixel_values"])
        self._indices = inputs.pop(INDICES, None)
        labels = inputs.get("labels")
        if labels is not None and labels.dim() == 3:
            void = labels == self.model.config.semantic_loss_ignore_index
            inputs["labels"] = labels.long().masked_fill(void, -100)
        return inputs

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = ((self.model.config.pretrained_cfg or {}).get(name, ()) for name in ("mean", "std"))
        if not len(mean) == len(std) == images.shape[1]:
            raise ValueError(
                f"By its config.pretrained_cfg the model is for images of {len(mean)} channels, but those of whole "
                f"numbers have {images.shape[1]}. Normalise them in your transform, or correct mean and std."
            )
        return normalize(to_dtype(images, torch.float32, scale=True), mean, std, inplace=True)

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__") and has_length(dataset):
            config = self.model.config
            dataset = SeededDataset(
                dataset, self.args.seed, config.num_labels, description.lower(), config.semantic_loss_ignore_index
            )
            if kwargs.get("is_training"):
                dataset.share_epoch()
                self._seeded_dataset = dataset
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return IndexedCollator(super()._get_collator_with_removed_columns(data_collator, description))

    # Evaluation

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate the averaged weights if there are any, with batch-norm statistics that agree on all processes."""
        self._synchronise_batch_norm()
        with self.average.applied_to(self.model) if self.average and self.is_in_train else nullcontext():
            return super().evaluation_loop(*args, **kwargs)
