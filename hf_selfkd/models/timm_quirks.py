"""What is special about some timm models: all of it is here, the larger part as data."""

import copy

from timm.layers import ClassifierHead
from torch import Tensor, nn

# Where feature_info names modules that do not exist or do not end the stage: first part of the name -> what ends it.
_STAGE_ENDS = {
    "Gemma4VitClassifier": {"blocks": "encoder.blocks"},
    "Hiera": {"blocks": "none"},  # its tokens lie in mask units, and only forward_intermediates puts them in rows
    "HighResolutionNet": {"stem": "act1"} | {f"stage{scale + 1}": f"incre_modules.{scale}" for scale in range(4)},
    "MobileNetV5": {"bn1": "conv_stem"},
    "MultiScaleVit": {"block": "stages"},
    "TResNet": {"": "body.conv1"},
    "Twins": {"block": "blocks"},
}

# Classes whose forward_intermediates reads values, which the meta device has not: their maps are the grid of patches.
_PATCH_GRIDS = {"Gemma4VitClassifier"}

# Classes that resize every image to the size they were built for.
_RESIZING = {"CrossVit"}

# Pooling that follows the first convolution, per family.
_STEM_POOLS = ("features.conv1_pool", "features.pool0", "maxpool", "pool0", "stem.pool")


def classifiers(backbone: nn.Module) -> list[nn.Module]:
    """List the modules whose inputs are the pre-logits: several for distilled and multi-branch models."""
    classifiers = backbone.get_classifier()
    if isinstance(classifiers, tuple) and isinstance(classifiers[0], nn.ModuleList):
        classifiers = classifiers[0]  # distilled and of several branches: the second list reads what the first reads
    if not isinstance(classifiers, (tuple, list, nn.ModuleList)):
        classifiers = [classifiers]
    return [_last_layer(classifier) for classifier in classifiers]


def _last_layer(classifier: nn.Module) -> nn.Module:
    if isinstance(classifier, ClassifierHead):  # some models give the whole head, with its pooling
        return classifier.fc
    return classifier[-1] if isinstance(classifier, nn.Sequential) else classifier  # made by _project_features


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module.

    Some networks keep tensors that they computed from their weights in eval mode (the attention biases of levit).
    Those hang on a graph if that was done with gradients, which ``copy.deepcopy`` refuses; the copy gets their values.
    """
    kept = [value for part in module.modules() for value in vars(part).values() if isinstance(value, dict)]
    tensors = [value for values in kept for value in values.values() if isinstance(value, Tensor)]
    computed = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    return copy.deepcopy(module, computed)
