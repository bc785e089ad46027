"""A frozen teacher inside a scaffold: another network that processes the same images."""

import json
import os
import threading
from typing import Any

import timm
import torch
from timm.models import parse_model_name
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..models.did_you_mean import did_you_mean
from ..models.outputs import MultiExitOutput
from .teacher_match import check_match


# The inputs of the classifier of the teacher that is running in this thread. Not an attribute of the teacher: that
# would break pickle, and two threads would get each other's images. Not the visitor of models.hooks either: a teacher
# need not be a timm model, and the visitor of a multi-exit teacher would keep the outputs of all its stages in memory.
class _Active(threading.local):
    def __init__(self):  # called in every thread; without a value torch.compile would compile twice
        self.features: list[Tensor] | None = None


_active = _Active()


class Teacher(nn.Module):
    """A frozen network: in eval mode also under ``train()``, without gradients, never saved.

    It gets the student's images, in the precision of the run, so it must accept their size and normalisation; a
    warning says where it was trained on others. The
    teacher in a multi-exit model is its final exit.

    Args:
        teacher: A timm model, multi-exit model or transformers image classifier, which is frozen; or a string: a
            folder, a Hub repository (``owner/name``), or a timm name, whose weights are downloaded.
        model: The student, a multi-exit model.
        with_features: Whether to also return the features that enter the classifier.

    Raises:
        TypeError: If ``teacher`` is none of these.
        ValueError: If nothing of that name exists, the teacher has other classes than the student, or the same in
            another order, another ``problem_type``, or shares weights with it, or ``with_features`` is set and the
            teacher has more than one classifier.
    """

    def __init__(self, teacher: nn.Module | str, model: nn.Module, *, with_features: bool = False):
        super().__init__()
        network = _load(teacher) if isinstance(teacher, str) else teacher
        num_classes = _num_classes(network)
        if num_classes != model.config.num_labels:
            raise ValueError(
                f"The teacher has {num_classes} classes, but the model has {model.config.num_labels}. "
                "Choose a teacher that was trained on the classes of the data."
            )
        _check_problem_type(network, model)
        check_match(network, model)
        if set(network.parameters()) & set(model.parameters()):
            raise ValueError("The teacher shares weights with the model in training. Pass a copy of it.")
        self.network = _core(network).requires_grad_(False).eval()
        self.with_features = with_features
        self.num_features = 0
        if with_features:
            layers = final_layers(network)
            if len(layers) != 1:
                raise ValueError(
                    f"The teacher's features are the inputs of its final linear layer, but {type(network).__name__} "
                    f"has {len(layers)} of them. Choose a teacher with one linear classifier."
                )
            self.num_features = layers[0].weight.shape[1]
            if _report not in layers[0]._forward_pre_hooks.values():  # the same teacher may be used in another run
                layers[0].register_forward_pre_hook(_report)

    def train(self, mode: bool = True):
        """Stay in eval mode."""
        return super().train(False)

    def state_dict(self, *args, destination: dict[str, Any] | None = None, **kwargs) -> dict[str, Any]:
        """Return nothing: a teacher is loaded from its source, not from the student's checkpoint."""
        return {} if destination is None else destination

    @torch.no_grad()
    def predict(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``teacher_logits`` ``(batch, classes)`` and optionally ``teacher_features`` ``(batch, width)``."""
        pixel_values = pixel_values.to(next(self.network.parameters()).dtype)
        previous, _active.features = _active.features, []
        try:
            output = self.network(pixel_values)
            features = _active.features
        finally:
            _active.features = previous
        predicted = {"teacher_logits": output if isinstance(output, Tensor) else output.logits}
        return predicted | ({"teacher_features": features[-1].flatten(1)} if self.with_features else {})

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, Tensor]:
        """Predict for the images that the student has just processed; see :meth:`predict`."""
        predicted = self.predict(pixel_values)
        if predicted["teacher_logits"].shape != output.logits.shape:
            raise ValueError(
                f"The teacher returns logits shaped {tuple(predicted['teacher_logits'].shape)}, the model "
                f"logits shaped {tuple(output.logits.shape)}. Teachers are for image classification."
            )
        return predicted


def _report(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if _active.features is not None:
        _active.features.append(args[0])


def _load(name: str) -> nn.Module:
    """Load a teacher by folder, Hub repository or timm name."""
    config = os.path.join(name, "config.json")
    if os.path.isfile(config):
        with open(config, encoding="utf-8") as file:
            # timm's own has a num_classes that transformers' wrapper refuses.
            if "model_type" not in json.load(file):
                return timm.create_model(f"local-dir:{name}", pretrained=True)
    if os.path.isdir(name) or ("/" in name and ":" not in name):
        return AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
    if ":" not in name and not timm.is_model(parse_model_name(name)[1].split(".")[0]):
        hint = did_you_mean(name, timm.list_models()) or " See timm.list_models()."
        raise ValueError(
            f"teacher='{name}' is neither a folder, a Hub repository (owner/name) nor a timm model.{hint}"
        )
    return timm.create_model(name, pretrained=True)


def _core(network: nn.Module) -> nn.Module:
    """Return the timm model inside a multi-exit model or transformers' timm wrapper, else the network itself.

    A multi-exit model would compute all its exits, or exit early.
    """
    model_type = network.config.model_type if isinstance(network, PreTrainedModel) else None
    return getattr(network, {"multi_exit": "backbone", "timm_wrapper": "timm_model"}.get(model_type, ""), network)


def _num_classes(network: nn.Module) -> int:
    if isinstance(network, PreTrainedModel):
        return network.config.num_labels
    if isinstance(network, nn.Module) and hasattr(network, "get_classifier"):
        return network.num_classes
    raise TypeError(
        "teacher must be a timm model, a multi-exit model, a transformers image classifier, or the name of one, but "
        f"got {type(network).__name__}."
    )


def _check_problem_type(network: nn.Module, model: nn.Module) -> None:
    """Check that both networks return softmax outputs, or both sigmoid outputs, where the teacher's are known."""
    if not isinstance(network, PreTrainedModel):
        return
    config = network.config
    if config.problem_type is None and config.model_type != "multi_exit":
        return
    if (config.problem_type == "multi_label_classification") != model.config.is_multi_label:
        raise ValueError(
            f"The teacher has problem_type={config.problem_type!r}, but the model {model.config.problem_type!r}: the "
            "outputs of one are those of a softmax, of the other of sigmoids. Choose a teacher that was trained for "
            "the same."
        )


def final_layers(network: nn.Module) -> list[nn.Module]:
    """List the linear layers that return the logits: one, or several for distilled and multi-branch models.

    Args:
        network: A timm model, multi-exit model or transformers image classifier.
    """
    core = _core(network)
    if hasattr(core, "get_classifier"):
        classifiers = core.get_classifier()
        parts = classifiers if isinstance(classifiers, (tuple, list, nn.ModuleList)) else [classifiers]
    else:
        parts = [child for child in core.children() if child is not core.base_model]
    linear = [[layer for layer in part.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))] for part in parts]
    return [layers[-1] for layers in linear if layers and layers[-1].weight.shape[0] == _num_classes(network)]
