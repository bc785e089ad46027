"""Copies of networks that keep what they have computed."""

import copy

from torch import Tensor, nn


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module.

    Some networks keep tensors that they computed from their weights in eval mode (the attention biases of levit).
    Those hang on a graph if that was done with gradients, which ``copy.deepcopy`` refuses; the copy gets their values.
    """
    kept = [value for part in module.modules() for value in vars(part).values() if isinstance(value, dict)]
    tensors = [value for values in kept for value in values.values() if isinstance(value, Tensor)]
    computed = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    return copy.deepcopy(module, computed)
