"""Students besides the network itself, and the fusion of their predictions: the scaffold of online distillation."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import cosine_overlap, gated_sum, gram_overlap
from ..models.outputs import MultiExitOutput

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
