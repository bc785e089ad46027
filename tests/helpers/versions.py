"""Differences between the supported versions of other packages that tests depend on, each with its reason."""

import pytest
import torch
import transformers
from packaging.version import Version

TRANSFORMERS, TORCH = (Version(package.__version__).release for package in (transformers, torch))

needs_train_loss_of_the_call = pytest.mark.skipif(
    TRANSFORMERS < (5, 19), reason="before transformers 5.19, train_loss divides by the steps of earlier calls too"
)
needs_sharding_on_cpus = pytest.mark.skipif(
    TORCH < (2, 11), reason="before torch 2.11, FSDP2 on gloo computes wrong gradients, also of other modules"
)


def checkpoint_activations(model, enable=True):
    """Call transformers' switch under the name it has: the former name is deprecated from 5.23."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_{'enable' if enable else 'disable'}")()
