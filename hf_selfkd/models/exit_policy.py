"""Exit policies: when an answer is sure enough to be the last."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CRITERIA = ("confidence", "entropy", "margin", "patience")


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """When an image may leave: at the first exit whose score reaches its threshold, at the deepest otherwise.

    Scores grow with certainty. With ``p`` the softmax of an exit's logits over its temperature:

    - ``confidence``: the largest ``p`` (Guo et al. 2017; MSDNet, Huang et al. 2018, section 4).
    - ``entropy``: one minus the entropy of ``p`` over log(classes) (BranchyNet, Teerapittayanon et al. 2016).
    - ``margin``: the largest ``p`` minus the second largest.
    - ``patience``: how many exits before this one in a row gave the same answer (PABEE, Zhou et al. 2020); 0 at the
      first.

    All but patience lie in [0, 1]: a threshold above 1 never lets an image leave, 0 always does.

    Args:
        criterion: One of the four scores.
        thresholds: One per auxiliary exit, shallow to deep, at least 0.
        temperatures: One per exit, the deepest included, above 0, in logit units; ``None`` for 1 everywhere.
        calibration: How :func:`calibrate` found the policy, for the model card; ``None`` if it did not.

    Raises:
        ValueError: If a field has the wrong type, length or range.
    """

    criterion: str = "confidence"
    thresholds: Sequence[float]
    temperatures: Sequence[float] | None = None
    calibration: dict[str, Any] | None = None

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            near = difflib.get_close_matches(str(self.criterion), CRITERIA, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"Unknown criterion {self.criterion!r}.{hint} Available: {', '.join(CRITERIA)}.")
        thresholds = _numbers("thresholds", self.thresholds, "at least 0", lambda value: value >= 0)
        temperatures = [1.0] * (len(thresholds) + 1) if self.temperatures is None else self.temperatures
        temperatures = _numbers("temperatures", temperatures, "above 0", lambda value: value > 0)
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
        """Number of exits, the deepest included."""
        return len(self.temperatures)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: ``ExitPolicy.from_dict(policy.to_dict()) == policy``."""
        fields = {
            "criterion": self.criterion,
            "thresholds": list(self.thresholds),
            "temperatures": list(self.temperatures),
        }
        return fields if self.calibration is None else fields | {"calibration": self.calibration}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ExitPolicy":
        """Build a policy from what :meth:`to_dict` returned, such as ``config.exit_policy``.

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
                f"An exit policy holds criterion, thresholds, temperatures and calibration, not {', '.join(unknown)}."
            )
        return cls(**fields)

    def check_num_exits(self, num_exits: int) -> None:
        """Raise ValueError unless the policy is one for ``num_exits`` exits."""
        if self.num_exits != num_exits:
            raise ValueError(
                f"The policy is for {self.num_exits} exits, but there are {num_exits}. Calibrate it on logits of "
                "this model."
            )

    def listens(self, exit: int) -> bool:
        """Whether an exit's answer can matter: where no image can leave early, its head need not be computed."""
        if self.criterion == "patience":
            return any(self.thresholds[later] <= later for later in range(exit, len(self.thresholds)))
        return self.thresholds[exit] <= 1

    def score(self, exit: int, logits: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Score the answers of one exit, in float32, finite for any logits but NaN.

        Args:
            exit: From 0, shallow to deep.
            logits: ``(batch, classes)``.
            history: What this returned for the same images at the exit before, ``None`` at the first.

        Returns:
            The scores ``(batch,)``, the confidences ``(batch,)``, and what to pass in at the next exit.
        """
        limit = torch.finfo(torch.float32).max  # half precision overflows to infinity, whose softmax is NaN
        probabilities = (logits.float() / self.temperatures[exit]).clamp(-limit, limit).softmax(dim=-1)
        confidence = probabilities.amax(dim=-1)
        if self.criterion == "patience":
            answers = probabilities.argmax(dim=-1)
            streak = torch.zeros_like(answers)
            if history is not None:
                streak = torch.where(answers == history[0], history[1] + 1, streak)
            return streak.float(), confidence, torch.stack([answers, streak])
        if self.criterion == "entropy":
            entropy = torch.special.entr(probabilities).sum(dim=-1) / math.log(max(2, logits.shape[-1]))
            return (1 - entropy).clamp(0, 1), confidence, None
        if self.criterion == "margin":
            largest = probabilities.topk(min(2, logits.shape[-1]), dim=-1).values
            return largest[:, 0] - largest[:, 1:].sum(dim=-1), confidence, None
        return confidence, confidence, None

    def decide(self, exit_logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Choose an exit for each image, given the logits of all.

        Args:
            exit_logits: ``(exits, batch, classes)``, or a sequence of ``(batch, classes)``, shallow to deep.

        Returns:
            The exits ``(batch,)`` and the logits there, ``(batch, classes)``.

        Raises:
            ValueError: If the policy is for another number of exits.

        Example:
            >>> policy = ExitPolicy(thresholds=[0.9])
            >>> exit_index, logits = policy.decide(torch.tensor([[[9.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 2.0]]]))
            >>> exit_index, logits.argmax(dim=1)
            (tensor([0, 1]), tensor([0, 1]))
        """
        self.check_num_exits(len(exit_logits))
        *early, answers = (torch.as_tensor(logits) for logits in exit_logits)
        exit_index = torch.full_like(answers[:, 0], len(early), dtype=torch.long)
        history = None
        for exit, logits in enumerate(early):
            scores, _, history = self.score(exit, logits, history)
            leaves = (scores >= self.thresholds[exit]) & (exit_index == len(early))
            exit_index = exit_index.masked_fill(leaves, exit)
            answers = torch.where(leaves.unsqueeze(-1), logits, answers)
        return exit_index, answers


def _numbers(name: str, values: Any, wanted: str, is_valid: Callable[[float], bool]) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and is_valid(value)
        for value in values
    ):
        raise ValueError(f"{name} must be a list of numbers {wanted}, but got {values!r}.")
    return tuple(float(value) for value in values)


def resolve_policy(policy: ExitPolicy | None, configured: dict[str, Any] | None, num_exits: int) -> ExitPolicy:
    """Return the policy given, or else the configured one, for a model with ``num_exits`` exits.

    Raises:
        ValueError: If there is none or it is for another number of exits.
    """
    if policy is None:
        if configured is None:
            raise ValueError(
                "early_exit needs a policy, but none was given and config.exit_policy is None. "
                "Set model.config.exit_policy = calibrate(...).to_dict()."
            )
        policy = ExitPolicy.from_dict(configured)
    policy.check_num_exits(num_exits)
    return policy
