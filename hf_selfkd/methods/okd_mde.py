"""Online distillation with diverse branches: copies of the last stage learn from their fused ensemble."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional import cosine_overlap, disagreement, gated_sum, gram_overlap, sigmoid_ramp
from ..models.outputs import MultiExitOutput
from .base import Method, check_range, divergence_of, missing_scaffold

logger = logging.getLogger(__name__)

OVERLAPS = {"cosine": cosine_overlap, "gram": gram_overlap}


class FeatureFusion(nn.Module):
    """Feature fusion module: maps the features of all students to a weight per student.

    The paper's layers are not published. This is the gate of related work (ONE, Lan et al. 2018) on the inputs that
    the abstract names. It normalises samples instead of batches, so that batches of one can be trained.

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
        """Map one ``(batch, width)`` per student to gates ``(batch, students)`` that sum to 1, in float32."""
        hidden = torch.relu(self.norm(self.squeeze(torch.cat(list(features), dim=1))))
        return self.gate(hidden).float().softmax(dim=1)


class Students(nn.Module):
    """The students besides the network's own last stage, and their fusion.

    Args:
        model: The multi-exit model.
        tails: Copies of the layers after the branching point, from ``model.copy_tail``. Student 0 is the model's own
            last stage. If empty, the other students are the exits, first to last.
        overlap: Name of the measure of overlap between classifiers, see :class:`OKDMDE`.
    """

    def __init__(self, model: nn.Module, tails: Sequence[nn.Module], overlap: str):
        super().__init__()
        self.branches = nn.ModuleList(tails)
        self.overlap = overlap
        others = [tail.classifiers for tail in tails] or [[head.classifier] for head in model.exits]
        # A tuple, so that the model's own classifier does not become part of this module's state.
        self._classifiers = (model.classifiers, *others)
        self.fusion = FeatureFusion(model.config.exit_width or model.anatomy.width, len(self._classifiers))

    def forward(self, pixel_values: Tensor, output: MultiExitOutput) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Return the fused ``ensemble_logits`` ``(batch, classes)``, and the ``overlap``.

        With branches, also their ``branch_logits``, one tensor ``(batch, classes)`` each.
        """
        logits, ensemble_logits = self.predict(output)
        weights = [_weight(classifiers) for classifiers in self._classifiers]
        fused = {"ensemble_logits": ensemble_logits, "overlap": OVERLAPS[self.overlap](weights)}
        return fused | ({"branch_logits": logits[1:]} if self.branches else {})

    def predict(self, output: MultiExitOutput) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the logits of every student and the fused ones, each ``(batch, classes)``."""
        *exits, own = zip(output.exit_logits, output.exit_features, strict=True)
        students = [own, *([branch(output.stage_outputs[branch.stage]) for branch in self.branches] or exits)]
        logits, features = zip(*students, strict=True)
        return logits, gated_sum(logits, self.fusion(features))

    def to_model(self, model: nn.Module, student: int) -> nn.Module:
        """Return a copy of the model with this student's branch as its last stage: a plain model, ready to save.

        Args:
            model: The model that was trained with these students.
            student: From 0, which is the model's own last stage.

        Raises:
            ValueError: If there is no such branch, or the model has exits after the branching point, which were
                trained on its own last stage.
        """
        if not 0 <= student <= len(self.branches):
            raise ValueError(
                f"There are branches 0 to {len(self.branches)}, but to_model was asked for {student}. "
                "Students that are exits are part of the model: use export_exit."
            )
        plain, branches = self._copy_with(model)
        if student > 0:
            branch = branches.branches[student - 1]
            if any(stage > branch.stage for stage in model.exit_stages):
                raise ValueError(
                    f"Branches begin after stage {branch.stage}, but the model has exits at {model.exit_stages}. "
                    f"Build it with exits up to stage {branch.stage} to use its branches alone."
                )
            plain.backbone.load_state_dict(branch.backbone.state_dict(), strict=False)
        return plain

    def to_ensemble(self, model: nn.Module) -> "Ensemble":
        """Return a module that computes the fused logits of all students, in eval mode.

        It is not a single multi-exit model: save it with ``torch.export``, or save its state.

        Args:
            model: The model that was trained with these students.
        """
        return Ensemble(*self._copy_with(model)).eval()

    def _copy_with(self, model: nn.Module) -> tuple[nn.Module, "Students"]:
        plain, students = copy.deepcopy((model, self))
        plain.scaffold = None
        plain.config.early_exit, plain.config.exit_policy = False, None  # calibrated for another final exit
        return plain, students


class Ensemble(nn.Module):
    """All students on one trunk, with fused logits.

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
        return self.students.predict(self.model(pixel_values, output_hidden_states=True))[1]


def _weight(classifiers: Sequence[nn.Module]) -> Tensor:
    """Return the weights ``(classes, width)`` of a linear classifier, concatenated if there are several."""
    linear = [
        [module for module in classifier.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        for classifier in classifiers
    ]
    return torch.cat([module.weight.flatten(1) for module in linear], dim=1)


@dataclass(frozen=True, kw_only=True)
class OKDMDE(Method):
    """Online Knowledge Distillation via Multi-branch Diversity Enhancement (Li et al., ACCV 2020).

    https://arxiv.org/abs/2010.00795. Neither the authors' code nor the numbers of the paper are public; where the
    abstract gives no details we follow related work (ONE, OKDDip) and say so. The students share the trunk, whose
    gradient is the sum over them. The network's own last stage is one of them, so the trained model is a branch;
    ``model.scaffold.to_model(model, student)`` returns another, ``to_ensemble(model)`` all. If the last stage cannot
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
