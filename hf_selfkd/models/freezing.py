"""Frozen parts of a backbone: which parameters its first stages use, and what stays in evaluation with them."""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves  # see hooks.py

from .dry_run import input_shape
from .hooks import Collector, attach_hooks, run
from .stages import Anatomy
from .timm_quirks import copy_to_meta


def parameters_of_stages(backbone: nn.Module, anatomy: Anatomy, num_stages: int) -> list[str]:
    """List the names of the parameters that the outputs of the first stages depend on.

    Differentiates the last of these outputs on the meta device, so that stems, position embeddings and class tokens
    are found in every family.

    Args:
        backbone: A timm model; it is not changed.
        anatomy: Its measured structure.
        num_stages: Number of stages, from 1.

    Raises:
        ValueError: If there are not so many stages.
    """
    if not 1 <= num_stages <= len(anatomy.stages):
        raise ValueError(
            f"num_stages must be from 1 to {len(anatomy.stages)}, the stages of the backbone, but got {num_stages!r}. "
            "Leave it out to freeze the complete backbone."
        )
    twin = copy_to_meta(backbone).requires_grad_(True).eval()
    attach_hooks(twin, [stage.module for stage in anatomy.stages])
    seen = Collector()
    with torch.device("meta"), torch.enable_grad():
        run(twin, anatomy, torch.empty(2, *input_shape(twin), dtype=next(twin.parameters()).dtype), seen)
        ends = [leaf for stage in range(num_stages) for leaf in tree_leaves(seen.outputs[stage])]
        total = sum(leaf.float().sum() for leaf in ends if isinstance(leaf, torch.Tensor))
        names, parameters = zip(*twin.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]


def keep_frozen_in_eval(backbone: nn.Module) -> None:
    """Put all modules in eval mode that have parameters and none to train."""
    for module in backbone.modules():
        trains = [parameter.requires_grad for parameter in module.parameters()]
        if trains and not any(trains):
            module.eval()


def keep_statistics(part: nn.Module) -> None:
    """Put normalisation layers with running statistics and without parameters to train in eval mode.

    An adapter (PEFT) is saved without the model that it adapts. Statistics of that model that changed would be lost.
    """
    for module in part.modules():
        trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if not trains and getattr(module, "running_mean", None) is not None:
            module.eval()


class BackboneFreezing:
    """Methods of the models that freeze and unfreeze the backbone."""

    _backbone_frozen = False

    def freeze_backbone(self, num_stages: int | None = None) -> None:
        """Freeze the backbone or its first stages: no gradients, and eval mode also under ``train()``.

        With ``deep_supervision`` this adds exits to a trained network without changing its predictions.
        ``requires_grad_(True)`` or :meth:`unfreeze_backbone` reverts it.

        Args:
            num_stages: Number of stages to freeze, with all that runs before them; ``None`` for the complete backbone.

        Raises:
            ValueError: If there are not so many stages.
        """
        parameters = dict(self.backbone.named_parameters())
        chosen = parameters if num_stages is None else parameters_of_stages(self.backbone, self.anatomy, num_stages)
        for name in chosen:
            parameters[name].requires_grad_(False)
        self._backbone_frozen = True
        keep_frozen_in_eval(self.backbone)

    def unfreeze_backbone(self) -> None:
        """Revert :meth:`freeze_backbone`."""
        self._backbone_frozen = False
        self.backbone.requires_grad_(True)
        self.backbone.train(self.training)

    def train(self, mode: bool = True):
        """Switch between training and evaluation; what :meth:`freeze_backbone` froze stays in evaluation.

        So do the batch norms that an adapter of PEFT does not save.
        """
        super().train(mode)
        self.shrinks_batch = None  # weights may change
        if self._backbone_frozen:
            keep_frozen_in_eval(self.backbone)
        if hasattr(self, "peft_config"):
            for name, part in self.named_children():
                if name != "scaffold":
                    keep_statistics(part)
        return self
