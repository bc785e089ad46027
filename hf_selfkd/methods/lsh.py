"""Feature mimicking: the student's features learn to lie on the teacher's side of many random planes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import (
    add,
    hash_loss,
    hash_projection,
    is_correct,
    masked_mean,
    median_bias,
    squared_error,
)
from ..models.outputs import MultiExitOutput
from .base import Method, check_range, missing_scaffold
from .teacher import Teacher, final_layers

# Hashes per element of a feature, on CIFAR.
HASHES_PER_FEATURE = 32


@dataclass(frozen=True, kw_only=True)
class LSH(Method):
    """Distilling Knowledge by Mimicking Features (Wang et al., TPAMI 2021): https://arxiv.org/abs/2011.01424.

    With a teacher, the final exit mimics its features, as in the paper. Without one, the auxiliary exits mimic those
    of the final exit: in this adaptation of ours each exit also learns from the labels, and the mimicking terms are
    summed.

    Args:
        teacher: A timm model, multi-exit model or transformers image classifier with one linear classifier, or the
            name of one: a folder, a Hub repository, or a timm name, whose weights are downloaded. It is frozen, gets
            the same images as the student, and is not saved with it. ``None`` for the final exit.
        mimic_weight: Weight of both mimicking terms, the paper's beta, at least 0: 6 on CIFAR, 5 on ImageNet.
        num_hashes: Number of planes; ``None`` is 32 times the width of the features, as on CIFAR; on ImageNet 2048.
        hash_std: Standard deviation of the planes' normals, above 0; ``None`` is that of the weights of the teacher's
            classifier, or of the final exit's before training. On ImageNet 0.06 and 0.03.
        bias: With ``"median"`` every plane halves the training set, for which the teacher processes it once before
            training; with ``"zero"`` all planes contain the origin, as on ImageNet. ``None`` is ``"median"`` with a
            teacher and ``"zero"`` without one, where medians are not possible: the features change in training.
        correct_only: Whether to mimic only images that the teacher predicts correctly, as in the authors' code for
            single labels. For probabilities, the label is the most probable class. A multi-label model mimics all
            images, as theirs does.
    """

    name: ClassVar[str] = "lsh"
    paper: ClassVar[str] = "https://arxiv.org/abs/2011.01424"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification")

    teacher: nn.Module | str | None = field(default=None, repr=False)
    mimic_weight: float = 6.0
    num_hashes: int | None = None
    hash_std: float | None = None
    bias: str | None = None
    correct_only: bool = True

    def __post_init__(self):
        check_range(self, "mimic_weight", 0)
        if self.num_hashes is not None and (type(self.num_hashes) is not int or self.num_hashes < 1):
            raise ValueError(f"LSH needs a positive integer as num_hashes, but got num_hashes={self.num_hashes!r}.")
        if self.hash_std is not None:
            check_range(self, "hash_std", 0, strict=True)
        if self.bias not in (None, "median", "zero"):
            raise ValueError(f"LSH needs bias 'median' or 'zero', but got bias={self.bias!r}.")
        if self.bias == "median" and self.teacher is None:
            raise ValueError(
                "LSH needs a teacher for bias='median', because the features of the final exit change in training. "
                "Pass a teacher, or bias='zero'."
            )

    @property
    def detach_exits(self) -> bool:
        """True with a teacher, because the paper has no exits."""
        return self.teacher is not None

    @property
    def min_exits(self) -> int:
        """Two without a teacher: an auxiliary exit mimics the final one."""
        return 1 if self.teacher is not None else 2

    def scaffold(self, model: nn.Module) -> "HashLayer":
        """Return the hash layer, which holds the teacher if there is one."""
        width = model.anatomy.width
        teacher = None
        if self.teacher is not None:
            teacher = Teacher(self.teacher, model, with_features=True)
            if teacher.num_features != width:
                raise ValueError(
                    f"LSH mimics the teacher's features, which have width {teacher.num_features}, but the model's "
                    f"have width {width}. Build the model with exit_width={teacher.num_features}."
                )
        std = self.hash_std
        if std is None:
            layers = final_layers(model if teacher is None else teacher.network)
            weights = [layer.weight.detach().float().flatten() for layer in layers]
            std = torch.cat(weights).std().item() if weights else 0.0
        if not std > 0:
            raise ValueError(
                "LSH scales its planes by the standard deviation of the classifier's weights, but these are all equal "
                "or missing. Start from trained weights, or set hash_std, such as 0.03."
            )
        return HashLayer(self.num_hashes or HASHES_PER_FEATURE * width, width, std, teacher).to(model.device)

    def prepare(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """With ``bias="median"``, set the biases from the training batches of all processes.

        Each process needs memory for the features of all training images.
        """
        if self.teacher is None or self.bias == "zero":
            return
        layer = model.scaffold
        features = [
            layer.teacher.predict(batch["pixel_values"])["teacher_features"].float().cpu() for batch in batches
        ]
        layer.bias.copy_(median_bias(_gather(features).to(layer.weight.device), layer.weight))

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``feature`` (mean squared error) and ``hash`` (binary cross-entropy of the hash bits).

        ``output.scaffold`` must hold the output of :class:`HashLayer`.
        """
        if output.scaffold is None:
            raise missing_scaffold(self, "its hash layer")
        if self.teacher is None:
            students, label_logits = output.exit_features[:-1], output.exit_logits
            teacher_features, teacher_logits = output.exit_features[-1], output.exit_logits[-1]
        else:
            students, label_logits = output.exit_features[-1:], output.exit_logits[-1:]
            teacher_features, teacher_logits = output.scaffold["teacher_features"], output.scaffold["teacher_logits"]
        masks = self.correct_only and not output.is_multi_label
        mask = is_correct(teacher_logits, labels) if masks else None
        errors = [squared_error(features, teacher_features) for features in students]
        target = output.scaffold["teacher_projection"]
        bits = [hash_loss(projection, target) for projection in output.scaffold["student_projections"]]
        return {
            "label": output.label_loss(label_logits, labels),
            "feature": self.mimic_weight * masked_mean(add(errors), mask),
            "hash": self.mimic_weight * masked_mean(add(bits), mask),
        }


class HashLayer(nn.Module):
    """Random planes in the space of features, fixed and equal on all processes, and the frozen teacher.

    Args:
        num_hashes: Number of planes.
        width: Width of the features.
        std: Standard deviation of the planes' normals.
        teacher: The teacher whose features are mimicked, ``None`` for the final exit.
    """

    def __init__(self, num_hashes: int, width: int, std: float, teacher: Teacher | None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # the same planes on every process and in every run
        self.register_buffer("weight", std * torch.randn(num_hashes, width, generator=generator))
        self.register_buffer("bias", torch.zeros(num_hashes))
        self.teacher = teacher

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Project the features of teacher and students.

        Returns:
            ``teacher_projection`` ``(batch, hashes)`` and ``student_projections``, one such tensor per exit that
            mimics it, first to last; with a frozen teacher also ``teacher_logits`` and ``teacher_features``.
        """
        if self.teacher is None:
            *students, features = output.exit_features
            predicted = {}
        else:
            students = output.exit_features[-1:]
            predicted = self.teacher(pixel_values, output)
            features = predicted["teacher_features"]
        return predicted | {
            "teacher_projection": hash_projection(features.detach(), self.weight, self.bias),
            "student_projections": tuple(hash_projection(student, self.weight, self.bias) for student in students),
        }


def _gather(batches: list[Tensor]) -> Tensor:
    """Concatenate the batches ``(samples, width)`` of all processes on the CPU; their numbers may differ."""
    if dist.is_available() and dist.is_initialized():
        gathered: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, batches)
        batches = [batch for process in gathered for batch in process]
    if not batches:
        raise ValueError("LSH got no training batches to compute medians from. Pass training data, or bias='zero'.")
    return torch.cat(batches)
