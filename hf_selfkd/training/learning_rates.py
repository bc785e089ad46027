"""Learning rates per part and per layer, as groups of parameters of the trainer's optimizer."""

from collections import defaultdict

import torch
from timm.models import group_parameters
from torch import nn
from transformers import Trainer

from ..methods.base import multi_exit_model
from . import recipe


def check_learning_rates(
    exit_learning_rate: float | None, layer_decay: float | None, *, has_own_optimizer: bool
) -> None:
    """Raise ValueError unless the trainer can give parts and layers these learning rates."""
    if exit_learning_rate is not None and not exit_learning_rate > 0:
        raise ValueError(f"exit_learning_rate must be above 0, but got {exit_learning_rate!r}.")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], but got {layer_decay!r}.")
    if has_own_optimizer and (exit_learning_rate, layer_decay) != (None, None):
        raise ValueError(
            "exit_learning_rate and layer_decay set the groups of the trainer's own optimizer, but optimizers or "
            "optimizer_cls_and_kwargs was passed. Give that optimizer groups with their learning rates instead; "
            "timm.optim.param_groups_layer_decay(model) builds them."
        )


def learning_rates(
    model: nn.Module, base: float, exit_learning_rate: float | None, layer_decay: float | None
) -> dict[nn.Parameter, float]:
    """Return the learning rate of each parameter of a multi-exit model.

    Args:
        model: A multi-exit model.
        base: Learning rate of the last layer of the backbone and of the scaffold.
        exit_learning_rate: That of the heads of all exits, the final exit included; ``None`` for ``base``.
        layer_decay: Factor from each layer of the backbone to the one before it (BEiT, appendix; layers as in timm's
            ``group_matcher``); ``None`` for 1.
    """
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    last, heads = max(layers.values()), model.head_parameters()
    rates = {}
    for name, parameter in model.named_parameters():
        if exit_learning_rate is not None and name in heads:
            rates[parameter] = exit_learning_rate
        else:
            rates[parameter] = base * (layer_decay or 1.0) ** (last - layers[name])
    return rates


def set_learning_rates(trainer: Trainer, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Split the groups of a new optimizer by the learning rates that the trainer asks for.

    Raises:
        ValueError: If the optimizer has no learning rate per group.
    """
    if not all(isinstance(group.get("lr"), float) for group in optimizer.param_groups):
        raise ValueError(
            f"exit_learning_rate and layer_decay need an optimizer with a learning rate per group, but optim="
            f"{trainer.args.optim!r} has none. Choose another one, such as adamw_torch."
        )
    base, network = trainer.args.learning_rate, multi_exit_model(model)
    rates = learning_rates(network, base, trainer.exit_learning_rate, trainer.layer_decay)
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        by_rate = defaultdict(list)
        for parameter in group["params"]:
            by_rate[rates[parameter]].append(parameter)
        for rate, parameters in by_rate.items():
            optimizer.add_param_group(group | {"params": parameters, "lr": rate})


class LearningRates:
    """Creates the optimizer and the scheduler of a trainer.

    Beyond the stock trainer's: a learning rate per part and layer, milestones, and weight decay by timm's convention.
    """

    exit_learning_rate: float | None
    layer_decay: float | None

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Create the optimizer as ``Trainer`` does; without these settings its groups stay as they are."""
        is_new, optimizer = self.optimizer is None, super().create_optimizer(model)
        if is_new and (self.exit_learning_rate, self.layer_decay) != (None, None):
            set_learning_rates(self, optimizer, self.model if model is None else model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Create the scheduler, from ``lr_milestones`` if there are any."""
        is_given = self.lr_scheduler is not None and not isinstance(self.lr_scheduler, recipe.MilestoneLR)
        if self.lr_milestones and not is_given:  # every run has its own
            self.lr_scheduler = recipe.milestone_scheduler(self, num_training_steps, optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """List the parameters with weight decay, by timm's convention unless ``decay_norms``."""
        return [name for name, _ in model.named_parameters()] if self.decay_norms else recipe.decayed_parameters(model)
