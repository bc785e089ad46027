"""Online distillation by diverse branches: copies of the last stage teach each other through a fused ensemble."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional import cosine_overlap, cross_entropy, disagreement, gram_overlap, mix, sigmoid_ramp, soften_kl
from ..models.outputs import MultiExitOutput
from .base import Method, check_range
from .teacher import missing_scaffold

logger = logging.getLogger(__name__)

OVERLAPS = {"cosine": cosine_overlap, "gram": gram_overlap}


class FeatureFusion(nn.Module):
    """Feature fusion module: the features of all students in, a weight for each student out.

    The paper's layers are not known. This is the gate of its family (ONE, Lan et al. 2018), fed with what the abstract
    asks for. It normalises a sample and not a batch, so that a batch of one trains too.

    Args:
        width: Width of a student's features.
        num_students: Number of students.
    """

    def __init__(self, width: int, num_students: int):
        super().__init__()
        self.squeeze = nn.Linear(num_students * width, width)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, num_students)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map one ``(batch, width)`` per student to gates ``(batch, students)`` that add up to 1, in float32."""
        hidden = torch.relu(self.norm(self.squeeze(torch.cat(list(features), dim=1))))
        return self.gate(hidden).float().softmax(dim=1)


class Students(nn.Module):
    """What trains beside the network's own last stage, or, without branches, beside its exits.

    Args:
        model: The multi-exit model that reads it.
        tails: Copies of what lies behind the branching point, from ``model.copy_tail``. Student 0 is the model's own
            last stage. Empty: the others are the exits, shallow to deep.
        overlap: Name of the measure of overlap between classifiers, see :class:`OKDMDE`.
    """

    def __init__(self, model: nn.Module, tails: Sequence[nn.Module], overlap: str):
        super().__init__()
        self.branches = nn.ModuleList(tails)
        self.overlap = overlap
        others = [tail.classifiers for tail in tails] or [[head.classifier] for head in model.exits]
        # A tuple, because the model's own classifier belongs to the model and not to this module's state.
        self._classifiers = (model.classifiers, *others)
        self.fusion = FeatureFusion(model.config.exit_width or model.anatomy.width, len(self._classifiers))

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Return the fused ``ensemble_logits`` ``(batch, classes)``, and the ``overlap``.

        With branches, also their ``branch_logits``, one tensor ``(batch, classes)`` each.
        """
        logits, ensemble_logits = self.answer(output)
        weights = [_weight(classifiers) for classifiers in self._classifiers]
        found = {"ensemble_logits": ensemble_logits, "overlap": OVERLAPS[self.overlap](weights)}
        return found | ({"branch_logits": logits[1:]} if self.branches else {})

    def answer(self, output: MultiExitOutput) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the logits of every student and the fused ones, each ``(batch, classes)``."""
        *exits, own = zip(output.exit_logits, output.exit_features, strict=True)
        answers = [own, *([branch(output.stage_outputs[branch.stage]) for branch in self.branches] or exits)]
        logits, features = zip(*answers, strict=True)
        return logits, mix(logits, self.fusion(features))

    def to_model(self, model: nn.Module, student: int) -> nn.Module:
        """Return a copy of the model in which this student's branch is the last stage: a plain model, ready to save.

        Args:
            model: The model that was trained with these students.
            student: From 0, which is the model's own last stage.

        Raises:
            ValueError: If there is no such branch, or the model has exits behind the branching point: they have only
                ever read its own last stage.
        """
        if not 0 <= student <= len(self.branches):
            raise ValueError(
                f"There are branches 0 to {len(self.branches)}, but to_model was asked for {student}. "
                "Students that are exits are in the model already: use export_exit."
            )
        shipped, branches = self._copy_with(model)
        if student > 0:
            branch = branches.branches[student - 1]
            if any(stage > branch.stage for stage in model.exit_stages):
                raise ValueError(
                    f"Branches begin behind stage {branch.stage}, but the model has exits at {model.exit_stages}. "
                    f"Build it with exits up to stage {branch.stage} to use its branches alone."
                )
            shipped.backbone.load_state_dict(branch.backbone.state_dict(), strict=False)
        return shipped

    def to_ensemble(self, model: nn.Module) -> "Ensemble":
        """Return a module that answers with the fused logits of all students, in eval mode.

        It is no checkpoint of one network: save it with ``torch.export`` or keep its state.

        Args:
            model: The model that was trained with these students.
        """
        return Ensemble(*self._copy_with(model)).eval()

    def _copy_with(self, model: nn.Module) -> tuple[nn.Module, "Students"]:
        shipped, students = copy.deepcopy((model, self))
        shipped.scaffold = None
        shipped.config.early_exit, shipped.config.exit_policy = False, None  # calibrated for another deepest exit
        return shipped, students


class Ensemble(nn.Module):
    """All students on one trunk, fused.

    Args:
        model: A multi-exit model.
        students: Its students.
    """

    def __init__(self, model: nn.Module, students: Students):
        super().__init__()
        self.model = model
        self.students = students

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map ``(batch, channels, height, width)`` to logits ``(batch, classes)``."""
        return self.students.answer(self.model(pixel_values, output_hidden_states=True))[1]


def _weight(classifiers: Sequence[nn.Module]) -> Tensor:
    """Return the weights ``(classes, width)`` of a linear classifier, or side by side of several."""
    linear = [
        [module for module in classifier.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        for classifier in classifiers
    ]
    return torch.cat([module.weight.flatten(1) for module in linear], dim=1)


@dataclass(frozen=True, kw_only=True)
class OKDMDE(Method):
    """Online Knowledge Distillation via Multi-branch Diversity Enhancement (Li et al., ACCV 2020).

    https://arxiv.org/abs/2010.00795. Neither the authors' code nor the numbers of the paper are public, so what the
    abstract leaves open follows its family (ONE, OKDDip) and is said to here. The students share the trunk, whose
    gradient is the sum over them. The network's own last stage is one of them, so the trained model is a branch;
    ``model.scaffold.to_model(model, student)`` gives another, ``to_ensemble(model)`` all. Of a network whose last
    stage cannot be copied the exits are the students, and are not detached then.

    Args:
        num_students: Students, the network's own last stage included, at least 2. The family takes 4.
        temperature: Softens all logits, above 0; the family's.
        ramp_epochs: Epochs over which the distillation grows to full weight, above 0; the family's 80 belong to 300.
        overlap: The classifier diversification loss, read in two re-implementations: ``"gram"``, the Frobenius norm of
            ``W_j^T W_k`` summed over pairs, or ``"cosine"``, which shrinking weights do not lower.
        overlap_weight: Its weight, at least 0. Both re-implementations take 5e-8, whose gradient is 1e-5 of that of a
            weight decay of 5e-4, thus without effect; ours equals that weight decay at initialisation.
    """

    name: ClassVar[str] = "okd_mde"
    paper: ClassVar[str] = "https://arxiv.org/abs/2010.00795"
    detach_exits: ClassVar[bool] = True

    num_students: int = 3
    temperature: float = 3.0
    ramp_epochs: float = 80
    overlap: str = "gram"
    overlap_weight: float = 2e-3

    def __post_init__(self):
        check_range(self, "num_students", 2)
        if not isinstance(self.num_students, int):
            raise ValueError(f"OKDMDE needs a whole number of students, but got num_students={self.num_students!r}.")
        check_range(self, "temperature", 0, strict=True)
        check_range(self, "ramp_epochs", 0, strict=True)
        if self.overlap not in list(OVERLAPS):  # a list, because what was given may have no hash
            raise ValueError(f"OKDMDE needs overlap 'gram' or 'cosine', but got overlap={self.overlap!r}.")
        check_range(self, "overlap_weight", 0)

    def scaffold(self, model: nn.Module) -> Students:
        """Copy the last stage, each copy initialised on its own: equal branches would stay equal for ever.

        Raises:
            ValueError: If the last stage cannot be copied and there are no exits to take its place.
        """
        try:
            tails = [model.copy_tail() for _ in range(self.num_students - 1)]
        except ValueError as error:
            if model.num_exits < 2:
                raise ValueError(f"{error} OKDMDE could take exits as students, but the model has none.") from error
            logger.warning("%s OKDMDE takes the %d exits as students instead.", error, model.num_exits)
            tails = []
        return Students(model, tails, self.overlap)

    def __call__(self, output: MultiExitOutput, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return ``label``, ``students``, ``ensemble``, ``logit`` and ``overlap``.

        The first two are the label losses of the network's own last stage and of the other students. ``ensemble`` is
        the label loss of the fused logits: they are detached as a target, so that nothing else teaches the fusion.
        The family does not detach them, and re-implementations disagree on the label loss.

        Raises:
            ValueError: If ``output`` comes from a model without students.
        """
        if output.scaffold is None:
            raise missing_scaffold(self, "its students")
        students, ensemble = _student_logits(output), output.scaffold["ensemble_logits"]
        ramp = sigmoid_ramp(math.floor(epoch) / self.ramp_epochs)  # published schedules change once an epoch
        return {
            "label": cross_entropy(students[0], labels),
            "students": cross_entropy(students[1:], labels),
            "ensemble": cross_entropy(ensemble, labels),
            "logit": ramp * soften_kl(students, ensemble, self.temperature),
            "overlap": self.overlap_weight * output.scaffold["overlap"],
        }

    def metrics(self, output: MultiExitOutput) -> dict[str, Tensor]:
        """Return the students' ``disagreement``: 0 tells that the branches have become one."""
        return {"disagreement": disagreement(_student_logits(output))}

    def detaches_exits(self, scaffold: Students) -> bool:
        """Unless the exits are students."""
        return len(scaffold.branches) > 0

    def leaves_out_exits(self, output: MultiExitOutput) -> bool:
        """Unless the exits are students, whose label loss is one of the terms."""
        return super().leaves_out_exits(output) and "branch_logits" in output.scaffold


def _student_logits(output: MultiExitOutput) -> tuple[Tensor, ...]:
    """Return the logits of every student ``(batch, classes)``, the network's own last stage first."""
    *exits, own = output.exit_logits
    return (own, *output.scaffold.get("branch_logits", exits))
