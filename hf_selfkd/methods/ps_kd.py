"""Progressive Self-Knowledge Distillation: the network's prediction of the epoch before softens the labels."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor
from typing import ClassVar

from torch import Tensor, nn

from ..functional import cross_entropy, masked_mean, smooth_labels, soft_cross_entropy
from ..models.outputs import MultiExitOutput
from .base import Method, check_range
from .predictions import Predictions, predictions_of


@dataclass(frozen=True, kw_only=True)
class PSKD(Method):
    """Self-Knowledge Distillation with Progressive Refinement of Targets (Kim et al., ICCV 2021).

    https://arxiv.org/abs/2006.12000. The target of an image is ``(1 - a) y + a p``, where ``p`` is the prediction of
    the final exit when it last saw the image, and ``a`` grows linearly with the epochs. The exits, which the paper
    does not have, learn from the same targets on detached feature maps. One prediction per image is kept, see
    :class:`~hf_selfkd.methods.predictions.Predictions` for the memory it takes.

    Args:
        alpha: The share of the prediction at the end of the ramp, in [0, 1].
        ramp_epochs: Epochs over which the share grows, above 0. In the authors' code this is the length of the run,
            for CIFAR 300 epochs: set it to the length of yours.
    """

    name: ClassVar[str] = "ps_kd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2006.12000"
    detach_exits: ClassVar[bool] = True
    reads_indices: ClassVar[bool] = True

    alpha: float = 0.8
    ramp_epochs: float = 300

    def __post_init__(self):
        check_range(self, "alpha", 0, 1)
        check_range(self, "ramp_epochs", 0, strict=True)

    def scaffold(self, model: nn.Module) -> Predictions:
        """Return the predictions, for no image yet."""
        return Predictions(model.config.num_labels).to(model.device)

    def allocate(self, scaffold: Predictions, num_images: int) -> None:
        """Make room for the predictions."""
        scaffold.allocate(num_images)

    def prepare(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """Forget the predictions of an earlier run."""
        model.scaffold.table.zero_()

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label`` and ``logit``, the parts of the two targets, each summed over all exits.

        In an image's first epoch its label takes the place of the prediction, as in the authors' code. Images without
        a label have no part in either.
        """
        predictions = predictions_of(self, output)
        probabilities = smooth_labels(labels, predictions.table.shape[1], 0.0)
        share = self.alpha * min((floor(epoch) + 1) / self.ramp_epochs, 1)
        targets = predictions.recall(output.sample_indices, probabilities)
        is_labelled = probabilities.sum(dim=1) > 0
        return {
            "label": (1 - share) * cross_entropy(output.exit_logits, labels),
            "logit": share * masked_mean(soft_cross_entropy(output.exit_logits, targets), is_labelled),
        }

    def remember(self, output: MultiExitOutput) -> None:
        """Keep the predictions of the final exit."""
        predictions_of(self, output).keep(output.sample_indices, output.exit_logits[-1].float().softmax(dim=1))

    def leaves_out_exits(self, output: MultiExitOutput) -> bool:
        """False: the terms are sums over all exits."""
        return False
