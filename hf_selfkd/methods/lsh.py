"""Feature mimicking: the student's features learn to lie on the teacher's side of many random planes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ..functional import add, hash_loss, is_correct, masked_mean, squared_error
from ..models.outputs import MultiExitOutput
from .averaged_teacher import FINAL, AveragedTeacher, check_teacher_decay
from .base import Method, check_range, missing_scaffold
from .hash_layer import HashLayer, build_hash_layer
from .teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class LSH(Method):
    """Distilling Knowledge by Mimicking Features (Wang et al., TPAMI 2021): https://arxiv.org/abs/2011.01424.

    With a teacher, the final exit mimics its features, as in the paper. Without one, the auxiliary exits mimic those
    of the final exit: in this adaptation of ours each exit also learns from the labels, and the mimicking terms are
    summed.

    Args:
        teacher: A timm model, multi-exit model or transformers image classifier with one linear classifier, or the
            name of one: a folder, a Hub repository, or a timm name, whose weights are downloaded. It is frozen, gets
            the same images as the student, and is not saved with it. ``None`` for the final exit, ``"ema"`` for the
            final exit of the network's moving average, whose place it takes.
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
        teacher_decay: Share of the moving average that remains at each step, in [0, 1); ``None`` is 0.999.
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
    teacher_decay: float | None = None

    def __post_init__(self):
        check_range(self, "mimic_weight", 0)
        if self.num_hashes is not None and (type(self.num_hashes) is not int or self.num_hashes < 1):
            raise ValueError(f"LSH needs a positive integer as num_hashes, but got num_hashes={self.num_hashes!r}.")
        if self.hash_std is not None:
            check_range(self, "hash_std", 0, strict=True)
        if self.bias not in (None, "median", "zero"):
            raise ValueError(f"LSH needs bias 'median' or 'zero', but got bias={self.bias!r}.")
        if self.bias == "median" and not self.has_frozen_teacher:
            raise ValueError(
                "LSH needs a teacher for bias='median', because the features of the final exit change in training. "
                "Pass a frozen teacher, or bias='zero'."
            )
        check_teacher_decay("LSH", self.teacher, self.teacher_decay)

    @property
    def has_frozen_teacher(self) -> bool:
        """Whether another network is the teacher, and not the final exit or its moving average."""
        return self.teacher is not None and self.teacher != FINAL

    @property
    def detach_exits(self) -> bool:
        """True with a frozen teacher, because the paper has no exits."""
        return self.has_frozen_teacher

    @property
    def min_exits(self) -> int:
        """Two without a frozen teacher: an auxiliary exit mimics the final one."""
        return 1 if self.has_frozen_teacher else 2

    def scaffold(self, model: nn.Module) -> HashLayer:
        """Return the hash layer, which holds the teacher if there is one."""
        teacher = None
        if self.teacher == FINAL:
            teacher = AveragedTeacher(model, self.teacher_decay)
        elif self.teacher is not None:
            teacher = Teacher(self.teacher, model, with_features=True)
        return build_hash_layer(model, teacher, self.num_hashes, self.hash_std)

    def prepare(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """With ``bias="median"``, set the biases from the training batches of all processes.

        Each process needs memory for the features of all training images.
        """
        super().prepare(model, batches)
        if self.has_frozen_teacher and self.bias != "zero":
            model.scaffold.fit_bias(batches)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``feature`` (mean squared error) and ``hash`` (binary cross-entropy of the hash bits).

        ``output.scaffold`` must hold the output of :class:`HashLayer`.
        """
        if output.scaffold is None:
            raise missing_scaffold(self, "its hash layer")
        students, label_logits = output.exit_features[:-1], output.exit_logits
        if self.has_frozen_teacher:
            students, label_logits = output.exit_features[-1:], output.exit_logits[-1:]
        teacher_features, teacher_logits = output.exit_features[-1], output.exit_logits[-1]
        if self.teacher is not None:
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
