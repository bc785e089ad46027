"""Layers of a multi-exit model by timm's own grouping, for optimizers with a learning rate per layer."""

from collections.abc import Callable

from timm.models import group_parameters
from torch import nn


class GroupedLayers:
    """Methods of the models that timm's ``param_groups_layer_decay`` and ``create_optimizer_v2`` read."""

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from the name of a parameter to its layer, as ``timm.models.group_parameters`` takes.

        Parameters of the backbone are in the layers of its own ``group_matcher``, from 0; those of exits and scaffold
        are in the last one, with the classifier.

        Args:
            coarse: Whether the stages of a hierarchical backbone are its layers, instead of its blocks.
        """
        layers = group_parameters(self.backbone, self.backbone.group_matcher(coarse=coarse), reverse=True)
        layers = {f"backbone.{name}": layer for name, layer in layers.items()}
        has_classifier = hasattr(self, "classifiers")  # timm's last layer; a segmentation model has none
        last = max(layers.values()) + (not has_classifier)
        return lambda name: layers.get(name, last)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm trains without weight decay, such as position embeddings."""
        names = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in names}

    def head_parameters(self) -> set[str]:
        """Return the names of the parameters of all exits: those outside the backbone, and its classifier's."""
        classifiers: list[nn.Module] = getattr(self, "classifiers", [])  # of segmentation the backbone has none
        own = {parameter for classifier in classifiers for parameter in classifier.parameters()}
        return {
            name
            for name, parameter in self.named_parameters()
            if not name.startswith("scaffold.") and (not name.startswith("backbone.") or parameter in own)
        }
