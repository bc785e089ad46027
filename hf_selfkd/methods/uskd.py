"""Universal Self-Knowledge Distillation: soft labels from the network's own confidence and ranking of the classes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..functional import (
    cross_entropy,
    masked_mean,
    non_target_log_softmax,
    smooth_labels,
    soft_cross_entropy,
    target_classes,
)
from ..models.outputs import MultiExitOutput
from .base import Method, check_range, missing_scaffold
from .customized_labels import target_labels, zipf_labels
from .weak_classifier import WeakClassifier, build_weak_classifier


@dataclass(frozen=True, kw_only=True)
class USKD(Method):
    """From Knowledge Distillation to Self-Knowledge Distillation (Yang et al., ICCV 2023).

    https://arxiv.org/abs/2303.13005. A weak classifier reads the stage before the last; its gradient reaches the
    backbone. Defaults are the authors' for ImageNet; for CIFAR-100 all three weights are 0.1.

    Args:
        target_weight: Weight of the loss of the label's class (the paper's alpha), at least 0.
        non_target_weight: Weight of the loss of all other classes (beta), at least 0.
        weak_weight: Weight of the weak classifier's label loss (mu), above 0. Its labels are smoothed by 0.1.
    """

    name: ClassVar[str] = "uskd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.13005"
    detach_exits: ClassVar[bool] = True

    target_weight: float = 1.0
    non_target_weight: float = 0.1
    weak_weight: float = 0.005

    def __post_init__(self):
        check_range(self, "target_weight", 0)
        check_range(self, "non_target_weight", 0)
        check_range(self, "weak_weight", 0, strict=True)

    def scaffold(self, model: nn.Module) -> WeakClassifier:
        """Build the weak classifier."""
        return build_weak_classifier(model)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``target``, ``non_target`` and ``weak``, each a mean over the labelled images."""
        if output.scaffold is None:
            raise missing_scaffold(self, "its weak classifier")
        logits, weak_logits = output.exit_logits[-1].float(), output.scaffold["weak_logits"].float()
        probabilities = smooth_labels(labels, logits.shape[1], 0.0)
        is_target, is_labelled = target_classes(probabilities), probabilities.sum(dim=1) > 0
        smoothed = smooth_labels(labels, logits.shape[1], 0.1)
        ranked = zipf_labels(logits, weak_logits, is_target)
        non_target = -(ranked * non_target_log_softmax(logits, is_target)).sum(dim=1)
        target = soft_cross_entropy(logits, target_labels(logits, probabilities, is_target))
        return {
            "label": cross_entropy(logits, labels),
            "target": self.target_weight * masked_mean(target, is_labelled),
            "non_target": self.non_target_weight * masked_mean(non_target, is_labelled),
            "weak": self.weak_weight * masked_mean(soft_cross_entropy(weak_logits, smoothed), is_labelled),
        }
