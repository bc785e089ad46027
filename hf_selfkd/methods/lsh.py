"""Feature mimicking: the student's features fall on the teacher's side of many random planes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import (
    add,
    cross_entropy,
    hash_loss,
    hash_projection,
    is_right,
    masked_mean,
    median_bias,
    squared_error,
)
from ..models.outputs import MultiExitOutput
from .base import Method, check_range
from .teacher import Teacher, final_layers, missing_scaffold

# Hashes per element of a feature, on CIFAR.
HASHES_PER_FEATURE = 32


@dataclass(frozen=True, kw_only=True)
class LSH(Method):
    """Distilling Knowledge by Mimicking Features (Wang et al., TPAMI 2021): https://arxiv.org/abs/2011.01424.

    With a teacher, the deepest exit mimics its features, as in the paper. Without one, the shallow exits mimic those
    of the deepest exit: our adaptation, each exit learns from the labels too and the mimicking terms are added up.

    Args:
        teacher: A timm model, multi-exit model or transformers image classifier with one linear classifier, or the
            name of one: a folder, a Hub repository, or a timm name, whose weights are fetched. It is frozen, sees the
            same images as the student, and is not saved with it. ``None`` for the deepest exit.
        mimic_weight: Weight of both mimicking terms, the paper's beta, at least 0: 6 on CIFAR, 5 on ImageNet.
        num_hashes: Number of planes; ``None`` is 32 times the width of the features, as on CIFAR. ImageNet had 2048.
        hash_std: Standard deviation of the planes' normals, above 0; ``None`` is that of the classifier's weights, the
            teacher's or that of the deepest exit as it starts. ImageNet had 0.06 and 0.03.
        bias: ``"median"`` lets every plane halve the training set, which takes a pass of the teacher over it first;
            ``"zero"`` puts all planes through the origin, as on ImageNet. ``None`` is ``"median"`` with a teacher.
            Without one it is ``"zero"`` and must be: medians of features that are still being learned go stale.
        correct_only: Whether to mimic only where the teacher is right, as the authors' code for single labels does.
            With probabilities for labels the largest one counts.
    """

    name: ClassVar[str] = "lsh"
    paper: ClassVar[str] = "https://arxiv.org/abs/2011.01424"

    teacher: nn.Module | str | None = field(default=None, repr=False)
    mimic_weight: float = 6.0
    num_hashes: int | None = None
    hash_std: float | None = None
    bias: str | None = None
    correct_only: bool = True

    def __post_init__(self):
        check_range(self, "mimic_weight", 0)
        if self.num_hashes is not None and (type(self.num_hashes) is not int or self.num_hashes < 1):
            raise ValueError(f"LSH needs a positive whole number of hashes, but got num_hashes={self.num_hashes!r}.")
        if self.hash_std is not None:
            check_range(self, "hash_std", 0, strict=True)
        if self.bias not in (None, "median", "zero"):
            raise ValueError(f"LSH needs bias 'median' or 'zero', but got bias={self.bias!r}.")
        if self.bias == "median" and self.teacher is None:
            raise ValueError(
                "LSH needs a teacher for bias='median', because the features of the deepest exit change while it "
                "learns. Give a teacher, or bias='zero'."
            )

    @property
    def detach_exits(self) -> bool:
        """With a teacher, as the paper knows no exits."""
        return self.teacher is not None

    @property
    def min_exits(self) -> int:
        """Two without a teacher: one to mimic the other."""
        return 1 if self.teacher is not None else 2

    def scaffold(self, model: nn.Module) -> "HashLayer":
        """Return the hash layer, and the teacher in it if there is one."""
        width = model.anatomy.width
        teacher = None
        if self.teacher is not None:
            teacher = Teacher(self.teacher, model, with_features=True)
            if teacher.num_features != width:
                raise ValueError(
                    f"LSH mimics the teacher's features, which are {teacher.num_features} wide, but the model's are "
                    f"{width} wide. Build the model with exit_width={teacher.num_features}."
                )
        std = self.hash_std
        if std is None:
            layers = final_layers(model if teacher is None else teacher.network)
            weights = [layer.weight.detach().float().flatten() for layer in layers]
            std = torch.cat(weights).std().item() if weights else 0.0
        if not std > 0:
            raise ValueError(
                "LSH scales its planes by the standard deviation of the classifier's weights, but they are all equal "
                "or there are none. Start from trained weights, or give hash_std, such as 0.03."
            )
        return HashLayer(self.num_hashes or HASHES_PER_FEATURE * width, width, std, teacher).to(model.device)

    def prepare(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """Set the biases to minus the medians over the training batches of all processes, if they are to be.

        Needs memory for the features of all training images, on each process.
        """
        if self.teacher is None or self.bias == "zero":
            return
        layer = model.scaffold
        features = [layer.teacher.answer(batch["pixel_values"])["teacher_features"].float().cpu() for batch in batches]
        layer.bias.copy_(median_bias(_gather(features).to(layer.weight.device), layer.weight))

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``feature`` (mean squared error) and ``hash`` (binary cross-entropy of the hash bits).

        ``output.scaffold`` must hold what :class:`HashLayer` gives.
        """
        if output.scaffold is None:
            raise missing_scaffold(self, "its hash layer")
        if self.teacher is None:
            students, label_logits = output.exit_features[:-1], output.exit_logits
            teacher_features, teacher_logits = output.exit_features[-1], output.exit_logits[-1]
        else:
            students, label_logits = output.exit_features[-1:], output.exit_logits[-1:]
            teacher_features, teacher_logits = output.scaffold["teacher_features"], output.scaffold["teacher_logits"]
        mask = is_right(teacher_logits, labels) if self.correct_only else None
        errors = [squared_error(features, teacher_features) for features in students]
        target = output.scaffold["teacher_projection"]
        bits = [hash_loss(projection, target) for projection in output.scaffold["student_projections"]]
        return {
            "label": cross_entropy(label_logits, labels),
            "feature": self.mimic_weight * masked_mean(add(errors), mask),
            "hash": self.mimic_weight * masked_mean(add(bits), mask),
        }


class HashLayer(nn.Module):
    """Random planes that cut the space of features, fixed and equal on all processes; with them the frozen teacher.

    Args:
        num_hashes: Number of planes.
        width: Width of the features.
        std: Standard deviation of the planes' normals.
        teacher: Whose features are mimicked, ``None`` for the deepest exit.
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
            mimics, shallow to deep; of a frozen teacher also ``teacher_logits`` and ``teacher_features``.
        """
        if self.teacher is None:
            *students, features = output.exit_features
            answer = {}
        else:
            students = output.exit_features[-1:]
            answer = self.teacher(pixel_values, output)
            features = answer["teacher_features"]
        return answer | {
            "teacher_projection": hash_projection(features.detach(), self.weight, self.bias),
            "student_projections": tuple(hash_projection(student, self.weight, self.bias) for student in students),
        }


def _gather(batches: list[Tensor]) -> Tensor:
    """Join batches ``(samples, width)`` on the CPU, those of all processes, which may have different numbers."""
    if dist.is_available() and dist.is_initialized():
        gathered: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, batches)
        batches = [batch for process in gathered for batch in process]
    if not batches:
        raise ValueError("LSH got no training batches to find medians in. Give training data, or bias='zero'.")
    return torch.cat(batches)
