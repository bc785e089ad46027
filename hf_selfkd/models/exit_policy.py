"""Exit policies: when a prediction is confident enough to exit early."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .criteria import CRITERIA, get_criterion
from .frontier import best_point
from .policy_checks import check_numbers, check_thresholds


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """When to exit early: an image exits where its score reaches the threshold first, else at the final exit.

    A score grows with certainty and lies in [0, 1]; only ``patience`` counts exits, from 0 at the first. A threshold
    of 0 is reached by every image, one above the largest possible score by none.

    Args:
        criterion: Name of the score, a key of :data:`CRITERIA`.
        thresholds: One per auxiliary exit, first to last, at least 0.
        temperatures: One per exit, the final one included, above 0, in logit units; ``None`` for 1 everywhere. The
            softmax is that of the logits over the temperature.
        calibration: How :func:`calibrate` found the policy, for the model card; ``None`` if it did not.

    Raises:
        ValueError: If a field has the wrong type, length or range.
    """

    criterion: str = "confidence"
    thresholds: Sequence[float]
    temperatures: Sequence[float] | None = None
    calibration: dict[str, Any] | None = None

    def __post_init__(self):
        get_criterion(self.criterion)
        thresholds = check_numbers("thresholds", self.thresholds, "at least 0", lambda value: value >= 0)
        temperatures = [1.0] * (len(thresholds) + 1) if self.temperatures is None else self.temperatures
        temperatures = check_numbers("temperatures", temperatures, "above 0", lambda value: value > 0)
        if len(temperatures) != len(thresholds) + 1:
            raise ValueError(
                "A policy has one threshold per auxiliary exit and one temperature per exit, so one more, but got "
                f"{len(thresholds)} thresholds and {len(temperatures)} temperatures."
            )
        if not isinstance(self.calibration, (dict, type(None))):
            raise ValueError(f"calibration must be a dictionary or None, but got {self.calibration!r}.")
        object.__setattr__(self, "thresholds", thresholds)
        object.__setattr__(self, "temperatures", temperatures)

    @property
    def num_exits(self) -> int:
        """Number of exits, the final one included."""
        return len(self.temperatures)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON: ``ExitPolicy.from_dict(policy.to_dict()) == policy``."""
        fields = {
            "criterion": self.criterion,
            "thresholds": list(self.thresholds),
            "temperatures": list(self.temperatures),
        }
        return fields if self.calibration is None else fields | {"calibration": self.calibration}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ExitPolicy":
        """Build a policy from the dictionary of :meth:`to_dict`, such as ``config.exit_policy``.

        Raises:
            ValueError: If a key is missing or unknown, or a value is out of range.
        """
        needed = {"criterion", "thresholds", "temperatures"}
        if missing := sorted(needed - fields.keys()):
            raise ValueError(
                f"An exit policy needs criterion, thresholds and temperatures, but {', '.join(missing)} is missing "
                f"from {sorted(fields)}."
            )
        if unknown := sorted(fields.keys() - needed - {"calibration"}):
            raise ValueError(
                f"An exit policy has criterion, thresholds, temperatures and calibration, not {', '.join(unknown)}."
            )
        return cls(**fields)

    def at(self, target_cost: float) -> "ExitPolicy":
        """Return the policy with the best accuracy at another mean cost, among those that :func:`calibrate` stored.

        Accuracy and cost are those on the calibration images, as with ``calibrate(..., target_cost=...)``; a guarantee
        that the policy came with does not hold for the new one.

        Args:
            target_cost: Largest mean cost, as a share of the final exit's, in (0, 1].

        Raises:
            ValueError: If the policy stores no frontier, or no policy that is so cheap.
        """
        thresholds, calibration = best_point(self.calibration, target_cost)
        return replace(self, thresholds=thresholds, calibration=calibration)

    def check_num_exits(self, num_exits: int) -> None:
        """Raise ValueError unless the policy is for ``num_exits`` exits."""
        if self.num_exits != num_exits:
            raise ValueError(
                f"The policy is for {self.num_exits} exits, but there are {num_exits}. Calibrate it on logits of "
                "this model."
            )

    def check_task(self, *, multi_label: bool) -> None:
        """Raise ValueError unless the criterion is one for models that are multi-label, or for others."""
        if CRITERIA[self.criterion].multi_label != multi_label:
            names = ", ".join(name for name, record in CRITERIA.items() if record.multi_label == multi_label)
            wanted, given = ("sigmoid", "a softmax") if multi_label else ("softmax", "sigmoid")
            raise ValueError(
                f"The criterion '{self.criterion}' scores {given} outputs, but problem_type makes those of the model "
                f"{wanted} outputs. Calibrate with one of {names}."
            )

    def is_reachable(self, exit: int) -> bool:
        """Whether some score reaches the threshold of an exit; always so of the final exit, which has none."""
        return exit >= len(self.thresholds) or self.thresholds[exit] <= CRITERIA[self.criterion].max_score(exit)

    def listens(self, exit: int) -> bool:
        """Whether the head of an auxiliary exit must be computed: whether its prediction can decide where to exit."""
        last = len(self.thresholds) if CRITERIA[self.criterion].uses_history else exit + 1
        return any(map(self.is_reachable, range(exit, last)))

    def score(self, exit: int, logits: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Score the predictions of one exit, in float32, finite for any logits but NaN.

        Args:
            exit: From 0, first to last.
            logits: ``(batch, classes)``.
            history: The history returned for the same images at the previous exit, ``None`` at the first.

        Returns:
            The scores ``(batch,)``, the confidences ``(batch,)``, and the history to pass in at the next exit.
        """
        limit = torch.finfo(torch.float32).max  # half precision overflows to infinity, whose softmax is NaN
        logits = (logits.float() / self.temperatures[exit]).clamp(-limit, limit)
        criterion = CRITERIA[self.criterion]
        probabilities = logits.sigmoid() if criterion.multi_label else logits.softmax(dim=-1)
        scores, history = criterion.score(probabilities, history)
        return scores, scores if criterion.multi_label else probabilities.amax(dim=-1), history

    def decide(self, exit_logits: Sequence[Tensor], thresholds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose an exit for each image, given the logits of all exits.

        Args:
            exit_logits: ``(exits, batch, classes)``, or a sequence of ``(batch, classes)``, first to last.
            thresholds: Thresholds of each image, ``(batch, auxiliary exits)``; ``None`` for the policy's.

        Returns:
            The exits ``(batch,)`` and the logits there, ``(batch, classes)``.

        Raises:
            ValueError: If the policy is for another number of exits, or thresholds have another shape or are negative
                or NaN.

        Example:
            >>> policy = ExitPolicy(thresholds=[0.9])
            >>> exit_index, logits = policy.decide(torch.tensor([[[9.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 2.0]]]))
            >>> exit_index, logits.argmax(dim=1)
            (tensor([0, 1]), tensor([0, 1]))
        """
        self.check_num_exits(len(exit_logits))
        *early, chosen = (torch.as_tensor(logits) for logits in exit_logits)
        if thresholds is not None:
            thresholds = check_thresholds(thresholds, len(chosen), len(early)).to(chosen.device)
        exit_index = torch.full_like(chosen[:, 0], len(early), dtype=torch.long)
        history = None
        for exit, logits in enumerate(early):
            scores, _, history = self.score(exit, logits, history)
            limit = self.thresholds[exit] if thresholds is None else thresholds[:, exit]
            exits = (scores >= limit) & (exit_index == len(early))
            exit_index = exit_index.masked_fill(exits, exit)
            chosen = torch.where(exits.unsqueeze(-1), logits, chosen)
        return exit_index, chosen


def resolve_policy(
    policy: ExitPolicy | None, configured: dict[str, Any] | None, num_exits: int, *, multi_label: bool = False
) -> ExitPolicy:
    """Return the given policy, or else the configured one, for a model with ``num_exits`` exits.

    Raises:
        ValueError: If there is none, or it is for another number of exits, or for models that are (not) multi-label.
    """
    if policy is None:
        if configured is None:
            raise ValueError(
                "early_exit needs a policy, but none was given and config.exit_policy is None. "
                "Set model.config.exit_policy = calibrate(...).to_dict()."
            )
        policy = ExitPolicy.from_dict(configured)
    policy.check_num_exits(num_exits)
    policy.check_task(multi_label=multi_label)
    return policy
