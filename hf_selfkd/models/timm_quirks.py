"""Peculiarities of individual timm families, as data where possible."""

import copy

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # see hooks.py

# Where feature_info names modules that do not exist or do not end the stage: first part of the name -> what ends it.
STAGE_ENDS = {
    "Gemma4VitClassifier": {"blocks": "encoder.blocks"},
    "Hiera": {"blocks": "none"},  # its tokens are ordered by mask units, which only forward_intermediates undoes
    "HighResolutionNet": {"stem": "act1"} | {f"stage{scale + 1}": f"incre_modules.{scale}" for scale in range(4)},
    "MobileNetV5": {"bn1": "conv_stem"},
    "MultiScaleVit": {"block": "stages"},
    "TResNet": {"": "body.conv1"},
    "Twins": {"block": "blocks"},
}

# Classes whose forward_intermediates reads values, which the meta device does not have: their feature maps are the
# grid of patches.
PATCH_GRIDS = {"Gemma4VitClassifier"}

# Classes that resize every image to the size they were built for.
RESIZING = {"CrossVit"}

# Pooling that follows the first convolution, per family.
STEM_POOLS = ("features.conv1_pool", "features.pool0", "maxpool", "pool0", "stem.pool")


def classifiers(backbone: nn.Module) -> list[nn.Module]:
    """List the modules whose inputs are the pre-logits: several for distilled and multi-branch models."""
    classifiers = backbone.get_classifier()
    if isinstance(classifiers, tuple) and isinstance(classifiers[0], nn.ModuleList):
        classifiers = classifiers[0]  # distilled, with several branches: the second list has the inputs of the first
    if not isinstance(classifiers, (tuple, list, nn.ModuleList)):
        classifiers = [classifiers]
    return [_last_layer(classifier) for classifier in classifiers]


def without_pooling(classifier: nn.Module) -> nn.Module:
    """Return a classifier from ``get_classifier``, which in some models holds its pooling too, without that."""
    return classifier.fc if isinstance(classifier, ClassifierHead) else classifier


def _last_layer(classifier: nn.Module) -> nn.Module:
    classifier = without_pooling(classifier)
    return classifier[-1] if isinstance(classifier, nn.Sequential) else classifier  # made by _project_features


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module, tensors included that it has computed and cached.

    In eval mode some networks cache tensors computed from their weights (the attention biases of levit). With
    gradients enabled these belong to a graph, which ``copy.deepcopy`` refuses; the copy gets their values.
    """
    computed = {id(tensor): tensor.detach().clone() for tensor in _tensors_of(module) if not tensor.is_leaf}
    return copy.deepcopy(module, computed)


def copy_to_meta(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module on the meta device: it has the shapes and dtypes and takes no memory."""
    shapes = {id(tensor): _to_meta(tensor) for tensor in _tensors_of(module)}
    return copy.deepcopy(module, shapes)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """List parameters, buffers and all tensors in plain attributes."""
    leaves = [leaf for part in module.modules() for leaf in tree_leaves(vars(part))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _to_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
