"""One step of early exit outside Python: a segment of the network, and the score of its exit."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.exit_policy import CRITERIA, ExitPolicy
from .segments import Segment


class Step(nn.Module):
    """A segment and the score of its exit, by the criterion and temperature of a policy.

    Args:
        segment: The segment; only its module is kept.
        policy: Its criterion and temperatures are used, its thresholds are not.
        exit: Index of the exit.
        examples: Arguments for a batch of two.
        rows: For each argument its rows per image along the first axis, 0 if that axis is not the batch.
    """

    def __init__(
        self, segment: Segment, policy: ExitPolicy, exit: int, examples: tuple[Tensor, ...], rows: tuple[int, ...]
    ):
        super().__init__()
        self.segment = segment.module
        self.policy = policy
        self.exit = exit
        self.examples = examples
        self.rows = rows
        uses_history = CRITERIA[policy.criterion].uses_history
        self.takes_history = uses_history and exit > 0
        self.gives_history = uses_history and exit < policy.num_exits - 1

    @property
    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The batch in the arguments, as ``torch.export`` and ``torch.onnx.export`` take it."""
        batch = torch.export.Dim("batch", min=1)
        return (tuple({0: rows * batch if rows > 1 else batch} if rows else {} for rows in self.rows),)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the segment.

        Args:
            tensors: What crosses the cut before the segment, images along their first axis; before that, from the
                second step on, the history ``(batch, 2)`` of a criterion that has one.

        Returns:
            Logits ``(batch, classes)``, score and confidence ``(batch,)``, and the arguments of the next step.
        """
        history = None
        if self.takes_history:
            history, *tensors = tensors
            history = history.T
        logits, *crossing = self.segment(*tensors)
        score, confidence, history = self.policy.score(self.exit, logits, history)
        if self.gives_history:
            crossing = [history.T, *crossing]
        return logits, score, confidence, *crossing


@torch.no_grad()
def build_steps(segments: Sequence[Segment], policy: ExitPolicy) -> list[Step]:
    """Score the exit of every segment.

    Args:
        segments: Those of :func:`~hf_selfkd.deploy.segments.cut_at_exits`.
        policy: Its criterion and temperatures are used, its thresholds are not.
    """
    steps = []
    for exit, segment in enumerate(segments):
        examples, rows = segment.examples, segment.rows
        if steps and steps[-1].gives_history:
            history = steps[-1](*steps[-1].examples)[3]
            examples, rows = (history, *examples), (1, *rows)
        steps.append(Step(segment, policy, exit, examples, rows).eval())
    return steps
