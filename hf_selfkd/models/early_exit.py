"""The visitor that lets images leave a network while it runs, and shrinks the batch that runs on."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .exit_policy import ExitPolicy
from .hooks import Visitor, join_rows, keep_rows
from .outputs import EarlyExitOutput

# Runs a network and returns its logits; the visitor sees each stage and may answer with fewer rows.
Network = Callable[[Tensor, Visitor], Tensor]
# ``answer(exit, output)`` runs an exit's head on the raw output of its stage and returns logits.
Answer = Callable[[int, Any], Tensor]


# Up to the first exit a CPU runs as many images at once as its caches hold: on larger batches the wide early maps of
# convolutional networks took 1.3 to 3 times as long (measured: ResNet, ConvNeXt, EfficientNet; ViT alike either way).
CPU_IMAGES_PER_THREAD = 2


class EveryoneLeft(Exception):
    """No image is left in the network, so the rest of it need not run."""


class Held(Exception):
    """Part of a batch has reached the first exit and waits there for the others."""


class EarlyExit(Visitor):
    """Visitor that lets images leave, and shrinks the batch that the rest of the network sees.

    Args:
        policy: Who may leave.
        answer: Runs the head of an exit.
        exits: The exit at each stage that has one.
        shrink: Whether the network runs on with the undecided images only; otherwise on all until all have decided.
    """

    def __init__(self, policy: ExitPolicy, answer: Answer, exits: dict[int, int], shrink: bool):
        self.policy = policy
        self.answer = answer
        self.exits = exits
        self.shrink = shrink
        self.rows: Tensor  # which images have not left
        self.held: list[Any] = []  # what the parts of the batch before the running one gave at the first exit
        self.parts_to_come = 0
        self.due = sorted(exits.values())
        self.waiting: dict[int, Tensor] = {}
        self.history: Tensor | None = None
        self.left: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def on_stage(self, stage: int, output: Any) -> Any:
        """Let images leave at a stage that has an exit; return the others' rows if the batch shrinks."""
        exit = self.exits.get(stage)
        if exit is None:
            return None
        replacement = None
        if self.parts_to_come:
            self.held.append(output)
            raise Held
        if self.held:
            output = replacement = join_rows([*self.held, output])
            self.held.clear()
        self.waiting[exit] = self.answer(exit, output)
        num_rows = len(self.waiting[exit])
        while self.due and self.due[0] in self.waiting:  # stages of parallel branches end in another order
            stay = self._let_leave(self.due.pop(0))
            if stay is not None and self.shrink:
                output = replacement = keep_rows(output, stay, num_rows)
                num_rows = len(stay)
        return replacement

    def _let_leave(self, exit: int) -> Tensor | None:
        """Let images leave at an exit that has answered; return which of the rows stay, ``None`` for all."""
        logits = self.waiting.pop(exit)
        if not self.shrink:
            logits = logits[self.rows]
        leaves, confidence = self.judge(exit, logits)
        num_leaving = int(leaves.sum())  # the one number that the host must know
        if num_leaving == 0:
            return None
        if num_leaving == len(leaves):
            self.left.append((exit, self.rows, logits, confidence))
            raise EveryoneLeft
        order = leaves.int().argsort(stable=True)
        stay, go = order[:-num_leaving], order[-num_leaving:]
        self.left.append((exit, self.rows[go], logits[go], confidence[go]))
        self.rows = self.rows[stay]
        self.history = None if self.history is None else self.history[:, stay]
        return stay

    def judge(self, exit: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return who leaves at an exit, and the confidences, both ``(rows,)``."""
        scores, confidence, self.history = self.policy.score(exit, logits, self.history)
        return scores >= self.policy.thresholds[exit], confidence

    def run(self, network: Network, pixel_values: Tensor) -> EarlyExitOutput:
        """Run a network on images ``(batch, channels, height, width)`` until every one has left. Once per visitor.

        Up to the first exit they may run in parts, behind it together.
        """
        deepest = self.policy.num_exits - 1
        self.rows = torch.arange(len(pixel_values), device=pixel_values.device)
        *parts, last = pixel_values.split(self._part_size(pixel_values))
        for self.parts_to_come in range(len(parts), 0, -1):
            with suppress(Held):
                network(parts[-self.parts_to_come], self)
        self.parts_to_come = 0
        try:
            logits = network(last, self)
        except EveryoneLeft:
            pass
        else:
            logits = logits if self.shrink else logits[self.rows]
            _, confidence, _ = self.policy.score(deepest, logits, self.history)
            self.left.append((deepest, self.rows, logits, confidence))
        exits, rows, logits, confidence = zip(*self.left, strict=True)
        in_order = torch.cat(rows).argsort()
        exit_index = torch.cat([torch.full_like(part, exit) for exit, part in zip(exits, rows, strict=True)])
        return EarlyExitOutput(
            logits=torch.cat(logits)[in_order],
            exit_index=exit_index[in_order],
            confidence=torch.cat(confidence)[in_order],
        )

    def _part_size(self, pixel_values: Tensor) -> int:
        whole = max(1, len(pixel_values))
        if not (self.shrink and self.exits) or pixel_values.device.type != "cpu":
            return whole
        return min(whole, CPU_IMAGES_PER_THREAD * torch.get_num_threads())


class _Rehearsal(EarlyExit):
    """Visitor that lets image ``i`` leave at exit ``i`` whatever its answer, and keeps what enters the classifier."""

    features: Tensor | None = None

    def on_features(self, features: Tensor) -> None:
        if self.features is None:  # of the first classifier where there are several
            self.features = features

    def judge(self, exit: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows == exit, torch.zeros_like(self.rows, dtype=torch.float32)

    def _part_size(self, pixel_values: Tensor) -> int:
        # on every device and for any number of threads, so that the verdict does not depend on them
        return 2 if self.shrink else len(pixel_values)


def can_shrink(network: Network, answer: Answer, exits: dict[int, int], pixel_values: Tensor) -> bool:
    """Tell whether a network can run on with fewer rows; warn with the reason if it cannot.

    It cannot where a stage is no cut of its graph, because a path runs past it, and where an image's answer depends
    on its batch. A few made-up images, unlike each other, run once in a shrinking batch and once in a whole one:
    one leaves at each exit and two reach the end, so three where there is one auxiliary exit.

    Args:
        network: Runs the network with a visitor.
        answer: Runs the head of an exit.
        exits: The exit at each stage that has one.
        pixel_values: Images ``(batch, channels, height, width)`` in the dtype of the weights; for size, dtype and
            device alone.
    """
    images = _unlike_images(len(exits) + 2, pixel_values)
    policy = ExitPolicy(thresholds=[0.0] * len(exits))
    whole, shrinking = (_Rehearsal(policy, answer, exits, shrink=shrink) for shrink in (False, True))
    with torch.autocast(images.device.type, enabled=False):
        expected = whole.run(network, images)
        try:
            found = shrinking.run(network, images)
        except Exception as error:  # whatever it is, this network does not run on fewer rows
            reason = f"{type(error).__name__}: {error}"
        else:
            if _agree(found.logits, expected.logits) and _agree(shrinking.features, whole.features[whole.rows]):
                return True
            reason = "the answers of the others change"
    warnings.warn(
        f"Single images cannot leave this network while it runs ({reason}). "
        "A batch runs on until all of its images have decided.",
        stacklevel=5,
    )
    return False


def _unlike_images(num_images: int, like: Tensor) -> Tensor:
    """Make noise images of different brightness and contrast, always the same, without touching the global seed."""
    images = torch.randn(num_images, *like.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu")
    steps = torch.linspace(-1, 1, num_images, device="cpu").view(-1, 1, 1, 1)
    return (images * 2**steps + steps).to(like)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether rows are the same but for rounding; other rows would be as far off as rows are from each other."""
    if found.shape != expected.shape:
        return False
    tolerance = 0.01 if expected.dtype.itemsize >= 4 else 0.1
    found, expected = found.float(), expected.float()
    spread = (expected - expected.mean(dim=0)).norm()
    return bool((found - expected).norm() <= tolerance * spread)
