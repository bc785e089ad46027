"""Random planes in the space of features, and the bits that say on which side of each plane a feature lies."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import hash_projection, median_bias
from ..models.outputs import MultiExitOutput
from .averaged_teacher import AveragedTeacher
from .teacher import Teacher, final_layers

# Hashes per element of a feature, on CIFAR.
HASHES_PER_FEATURE = 32


class HashLayer(nn.Module):
    """Random planes in the space of features, fixed and equal on all processes, and the frozen teacher.

    Args:
        num_hashes: Number of planes.
        width: Width of the features.
        std: Standard deviation of the planes' normals.
        teacher: The teacher whose features are mimicked, ``None`` for the final exit.
    """

    def __init__(self, num_hashes: int, width: int, std: float, teacher: Teacher | AveragedTeacher | None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # the same planes on every process and in every run
        self.register_buffer("weight", std * torch.randn(num_hashes, width, generator=generator))
        self.register_buffer("bias", torch.zeros(num_hashes))
        self.teacher = teacher

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Project the features of teacher and students.

        Returns:
            ``teacher_projection`` ``(batch, hashes)`` and ``student_projections``, one such tensor per exit that
            mimics it, first to last; with a teacher also ``teacher_logits`` and ``teacher_features``.
        """
        *students, features = output.exit_features
        if isinstance(self.teacher, Teacher):
            students = output.exit_features[-1:]
        predicted = {} if self.teacher is None else self.teacher(pixel_values, output)
        features = predicted.get("teacher_features", features)
        return predicted | {
            "teacher_projection": hash_projection(features.detach(), self.weight, self.bias),
            "student_projections": tuple(hash_projection(student, self.weight, self.bias) for student in students),
        }

    def fit_bias(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Move each plane to the median of the teacher's features, over the batches of all processes."""
        predicted = (self.teacher.predict(batch["pixel_values"]) for batch in batches)
        features = [output["teacher_features"].float().cpu() for output in predicted]
        self.bias.copy_(median_bias(_gather(features).to(self.weight.device), self.weight))


def build_hash_layer(
    model: nn.Module, teacher: Teacher | AveragedTeacher | None, num_hashes: int | None, std: float | None
) -> HashLayer:
    """Build the hash layer for a multi-exit model.

    Args:
        model: The model in training.
        teacher: As in :class:`HashLayer`.
        num_hashes: Number of planes; ``None`` is 32 times the width of the features.
        std: Standard deviation of the planes' normals; ``None`` is that of the weights of the classifier on the
            mimicked features.

    Raises:
        ValueError: If the teacher's features have another width than the model's, or ``std`` is ``None`` and the
            classifier's weights are all equal.
    """
    width = model.anatomy.width
    if isinstance(teacher, Teacher) and teacher.num_features != width:
        raise ValueError(
            f"LSH mimics the teacher's features, which have width {teacher.num_features}, but the model's "
            f"have width {width}. Build the model with exit_width={teacher.num_features}."
        )
    if std is None:
        std = _classifier_std(teacher.network if isinstance(teacher, Teacher) else model)
    return HashLayer(num_hashes or HASHES_PER_FEATURE * width, width, std, teacher).to(model.device)


def _classifier_std(network: nn.Module) -> float:
    weights = [layer.weight.detach().float().flatten() for layer in final_layers(network)]
    std = torch.cat(weights).std().item() if weights else 0.0
    if not std > 0:
        raise ValueError(
            "LSH scales its planes by the standard deviation of the classifier's weights, but these are all equal "
            "or missing. Start from trained weights, or set hash_std, such as 0.03."
        )
    return std


def _gather(batches: list[Tensor]) -> Tensor:
    """Concatenate the batches ``(samples, width)`` of all processes on the CPU; their numbers may differ."""
    if dist.is_available() and dist.is_initialized():
        gathered: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, batches)
        batches = [batch for process in gathered for batch in process]
    if not batches:
        raise ValueError("LSH got no training batches to compute medians from. Pass training data, or bias='zero'.")
    return torch.cat(batches)
