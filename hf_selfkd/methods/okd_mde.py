"""Online distillation with diverse branches: copies of the last stage learn from their fused ensemble."""

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..functional import disagreement, sigmoid_ramp
from ..models.outputs import MultiExitOutput
from .base import Method, check_range, divergence_of, missing_scaffold
from .students import OVERLAPS, Students

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OKDMDE(Method):
    """Online Knowledge Distillation via Multi-branch Diversity Enhancement (Li et al., ACCV 2020).

    https://arxiv.org/abs/2010.00795. Neither the authors' code nor the numbers of the paper are public; where the
    abstract gives no details we follow related work (ONE, OKDDip) and say so. The students share the trunk, whose
    gradient is the sum over them. The network's own last stage is one of them, so the trained model is a branch;
    ``trainer.scaffold.to_model(model, student)`` returns another, ``to_ensemble(model)`` all. If the last stage cannot
    be copied, the exits are the students and are not detached.

    Args:
        num_students: Number of students, the network's own last stage included, at least 2. Related work takes 4.
        temperature: Softens all logits, above 0; that of related work.
        ramp_epochs: Epochs over which the distillation rises to full weight, above 0; in related work 80 of 300.
        overlap: The classifier diversification loss, as in two re-implementations: ``"gram"``, the Frobenius norm of
            ``W_j^T W_k`` summed over pairs, or ``"cosine"``, which does not decrease with the weights.
        overlap_weight: Its weight, at least 0. Both re-implementations take 5e-8, whose gradient is 1e-5 of that of a
            weight decay of 5e-4 and thus has no effect; ours equals that weight decay at initialisation.
    """

    name: ClassVar[str] = "okd_mde"
    paper: ClassVar[str] = "https://arxiv.org/abs/2010.00795"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "multi-label-classification")
    detach_exits: ClassVar[bool] = True

    num_students: int = 3
    temperature: float = 3.0
    ramp_epochs: float = 80
    overlap: str = "gram"
    overlap_weight: float = 2e-3

    def __post_init__(self):
        check_range(self, "num_students", 2)
        if not isinstance(self.num_students, int):
            raise ValueError(f"OKDMDE needs an integer as num_students, but got num_students={self.num_students!r}.")
        check_range(self, "temperature", 0, strict=True)
        check_range(self, "ramp_epochs", 0, strict=True)
        if self.overlap not in list(OVERLAPS):  # a list, because the value may be unhashable
            raise ValueError(f"OKDMDE needs overlap 'gram' or 'cosine', but got overlap={self.overlap!r}.")
        check_range(self, "overlap_weight", 0)

    def scaffold(self, model: nn.Module) -> Students:
        """Copy the last stage, with a new initialisation for each copy: equal branches would stay equal.

        Raises:
            ValueError: If the last stage cannot be copied and the model has no auxiliary exits.
        """
        try:
            tails = [model.copy_tail() for _ in range(self.num_students - 1)]
        except ValueError as error:
            if model.num_exits < 2:
                raise ValueError(f"{error} OKDMDE could use exits as students, but the model has none.") from error
            logger.warning("%s OKDMDE uses the %d exits as students instead.", error, model.num_exits)
            tails = []
        return Students(model, tails, self.overlap)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``students``, ``ensemble``, ``logit`` and ``overlap``.

        The first two are the label losses of the network's own last stage and of the other students. ``ensemble`` is
        the label loss of the fused logits, the only term that trains the fusion: as a target they are detached.
        Related work does not detach them, and re-implementations disagree on the label loss.

        Raises:
            ValueError: If ``output`` comes from a model without students.
        """
        if output.scaffold is None:
            raise missing_scaffold(self, "its students")
        students, ensemble = _student_logits(output), output.scaffold["ensemble_logits"]
        ramp = sigmoid_ramp(math.floor(epoch) / self.ramp_epochs)  # published schedules change once per epoch
        return {
            "label": output.label_loss(students[0], labels),
            "students": output.label_loss(students[1:], labels),
            "ensemble": output.label_loss(ensemble, labels),
            "logit": ramp * divergence_of(output)(students, ensemble, self.temperature),
            "overlap": self.overlap_weight * output.scaffold["overlap"],
        }

    def metrics(self, output: MultiExitOutput) -> dict[str, Tensor]:
        """Return the students' ``disagreement``, which is 0 if all branches are equal."""
        return {"disagreement": disagreement(_student_logits(output), multi_label=output.is_multi_label)}

    def detaches_exits(self, scaffold: Students) -> bool:
        """True unless the exits are students."""
        return len(scaffold.branches) > 0

    def leaves_out_exits(self, output: MultiExitOutput) -> bool:
        """True unless the exits are students, whose label loss is one of the terms."""
        return super().leaves_out_exits(output) and "branch_logits" in output.scaffold


def _student_logits(output: MultiExitOutput) -> tuple[Tensor, ...]:
    """Return the logits of every student ``(batch, classes)``, the network's own last stage first."""
    *exits, own = output.exit_logits
    return (own, *output.scaffold.get("branch_logits", exits))
