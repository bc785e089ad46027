"""Early exit during the forward pass: confident images exit, and the network continues with a smaller batch.

Call path: ``model.early_exit`` -> :func:`exit_early` -> :class:`EarlyExit` -> :func:`run_in_chunks` -> ``hooks.run``.
"""

import warnings
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .exit_policy import ExitPolicy
from .hooks import Visitor, join_rows, keep_rows, run
from .outputs import EarlyExitOutput
from .policy_checks import check_thresholds

# Up to the first exit a CPU runs as many images at once as its caches hold: with larger batches the wide early feature
# maps of convolutional networks took 1.3 to 3 times as long (measured: ResNet, ConvNeXt, EfficientNet; no difference
# for ViT).
CPU_IMAGES_PER_THREAD = 2


class AllExited(Exception):
    """No image is left in the network, so the rest of it need not run."""


class ChunkDone(Exception):
    """A chunk has reached the stage where it waits for the rest of its batch."""


def exit_early(
    model: nn.Module, pixel_values: Tensor, policy: ExitPolicy, thresholds: Tensor | None = None
) -> EarlyExitOutput:
    """Run a model on images, each of which exits at the exit that the policy selects.

    Args:
        model: A multi-exit model for classification, in eval mode. Whether its batches can shrink is found out once
            and kept as ``model.shrinks_batch``.
        pixel_values: ``(batch, channels, height, width)``.
        policy: Policy for the exits of the model.
        thresholds: Thresholds of each image, ``(batch, auxiliary exits)``; ``None`` for the policy's.
    """
    if thresholds is not None:
        thresholds = check_thresholds(thresholds, len(pixel_values), len(policy.thresholds)).to(pixel_values.device)
    if not model.anatomy.in_order and len(model.exit_stages) > 1:
        return _choose_exits_afterwards(model, pixel_values, policy, thresholds)
    if model.shrinks_batch is None and len(pixel_values) > 1:
        model.shrinks_batch = can_shrink(model, pixel_values)
    return EarlyExit(model, policy, pixel_values, thresholds, shrink=model.shrinks_batch is not False).route()


def _choose_exits_afterwards(
    model: nn.Module, pixel_values: Tensor, policy: ExitPolicy, thresholds: Tensor | None
) -> EarlyExitOutput:
    """Compute all exits, then choose among them in their order."""
    warnings.warn(
        f"The stages of {model.config.backbone} do not end in order, so early_exit computes all exits. "
        "With a single auxiliary exit it saves time.",
        stacklevel=6,
    )
    exit_logits = model(
        pixel_values, output_hidden_states=True, return_dict=True
    ).exit_logits  # hidden states imply all exits
    exit_index, logits = policy.decide(exit_logits, thresholds)
    confidences = torch.stack([policy.score(exit, logits)[1] for exit, logits in enumerate(exit_logits)])
    return EarlyExitOutput(logits, exit_index, confidences.gather(0, exit_index.unsqueeze(0))[0])


class EarlyExit(Visitor):
    """Routes one batch through a network: at each exit, images whose score reaches the threshold exit.

    Args:
        model: A multi-exit model for classification.
        policy: Policy for its exits.
        pixel_values: The batch, ``(batch, channels, height, width)``.
        thresholds: Thresholds of each image, ``(batch, auxiliary exits)``; ``None`` for the policy's.
        shrink: Whether the network continues with the remaining images only; otherwise with all images until the last
            has exited.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: ExitPolicy,
        pixel_values: Tensor,
        thresholds: Tensor | None = None,
        *,
        shrink: bool,
    ):
        self.model = model
        self.policy = policy
        self.pixel_values = pixel_values
        self.thresholds = thresholds
        self.shrink = shrink
        loosest = policy if thresholds is None else _loosest(policy, thresholds)
        self.exit_at = {stage: exit for exit, stage in enumerate(model.exit_stages) if loosest.listens(exit)}
        self.rows = torch.arange(len(pixel_values), device=pixel_values.device)  # images that have not exited
        self.history: Tensor | None = None
        self.exited: list[tuple[int, Tensor, Tensor, Tensor]] = []  # exit, rows, logits, confidences

    def route(self) -> EarlyExitOutput:
        """Run the network until every image has exited. Once per object."""
        first_stage = min(self.exit_at, default=None)
        try:
            logits = run_in_chunks(self.model, self.pixel_values, self, first_stage, self.chunk_size)
        except AllExited:
            pass
        else:
            final = self.policy.num_exits - 1
            logits = logits if self.shrink else logits[self.rows]
            _, confidence, _ = self.policy.score(final, logits, self.history)
            self.exited.append((final, self.rows, logits, confidence))
        exits, rows, logits, confidence = zip(*self.exited, strict=True)
        in_order = torch.cat(rows).argsort()
        exit_index = torch.cat([torch.full_like(part, exit) for exit, part in zip(exits, rows, strict=True)])
        return EarlyExitOutput(
            logits=torch.cat(logits)[in_order],
            exit_index=exit_index[in_order],
            confidence=torch.cat(confidence)[in_order],
        )

    @property
    def chunk_size(self) -> int:
        """Images that run at once up to the first exit."""
        if not self.shrink or self.pixel_values.device.type != "cpu":
            return len(self.pixel_values)
        return CPU_IMAGES_PER_THREAD * torch.get_num_threads()

    def on_stage(self, stage: int, output: Any) -> Any:
        """Exit images at a stage that has an exit; return the rows of the others if the batch shrinks."""
        exit = self.exit_at.get(stage)
        if exit is None:
            return None
        logits = self.model.logits_at_exit(exit, output, tuple(self.pixel_values.shape[-2:]))
        stay = self._exit_images(exit, logits if self.shrink else logits[self.rows])
        return None if stay is None or not self.shrink else keep_rows(output, stay, len(logits))

    def _exit_images(self, exit: int, logits: Tensor) -> Tensor | None:
        """Record the images that exit; return which of the remaining rows stay, ``None`` for all of them."""
        exits_here, confidence = self.judge(exit, logits)
        num_exiting = int(exits_here.sum())  # the only value that is copied to the host
        if num_exiting == 0:
            return None
        if num_exiting == len(exits_here):
            self.exited.append((exit, self.rows, logits, confidence))
            raise AllExited
        order = exits_here.int().argsort(stable=True)
        stay, go = order[:-num_exiting], order[-num_exiting:]
        self.exited.append((exit, self.rows[go], logits[go], confidence[go]))
        self.rows = self.rows[stay]
        self.history = None if self.history is None else self.history[:, stay]
        return stay

    def judge(self, exit: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return which images exit, and their confidences, both ``(rows,)``."""
        scores, confidence, self.history = self.policy.score(exit, logits, self.history)
        limit = self.policy.thresholds[exit] if self.thresholds is None else self.thresholds[self.rows, exit]
        return scores >= limit, confidence


def _loosest(policy: ExitPolicy, thresholds: Tensor) -> ExitPolicy:
    """Return the policy with the lowest threshold of any image at each exit; the policy itself without images."""
    if len(thresholds) == 0:
        return policy
    never = torch.finfo(torch.float32).max  # infinity is a threshold that no score reaches
    return replace(policy, thresholds=thresholds.amin(dim=0).clamp(max=never).tolist())


class _WaitForChunks(Visitor):
    """Holds the outputs of chunks at a stage; from there on the inner visitor receives the complete batch.

    Args:
        until: Index of the stage.
        visitor: The inner visitor.
    """

    def __init__(self, until: int, visitor: Visitor):
        self.until = until
        self.visitor = visitor
        self.outputs: list[Any] = []
        self.is_last_chunk = False

    def on_stage(self, index: int, output: Any) -> Any:
        if index != self.until:
            return self.visitor.on_stage(index, output)
        self.outputs.append(output)
        if not self.is_last_chunk:
            raise ChunkDone
        complete = join_rows(self.outputs)
        self.outputs.clear()
        replacement = self.visitor.on_stage(index, complete)
        return complete if replacement is None else replacement

    def on_features(self, features: Tensor) -> None:
        self.visitor.on_features(features)


def run_in_chunks(model: nn.Module, images: Tensor, visitor: Visitor, until: int | None, chunk_size: int) -> Tensor:
    """Run a network in chunks up to a stage and with the complete batch from there on.

    Args:
        model: A multi-exit model.
        images: ``(batch, channels, height, width)``.
        visitor: Receives the stage ``until`` and all later stages once, with the complete batch.
        until: Index of the stage; ``None`` runs the complete batch at once.
        chunk_size: Images that run at once.

    Returns:
        The logits ``(rows, classes)`` of the rows that the visitor kept.
    """
    if until is None or len(images) <= chunk_size:
        return run(model.backbone, model.anatomy, images, visitor)
    *chunks, last = images.split(chunk_size)
    waiting = _WaitForChunks(until, visitor)
    for chunk in chunks:
        with suppress(ChunkDone):
            run(model.backbone, model.anatomy, chunk, waiting)
    waiting.is_last_chunk = True
    return run(model.backbone, model.anatomy, last, waiting)


class _Rehearsal(EarlyExit):
    """Exits image ``i`` at exit ``i`` whatever its logits, and keeps the features of the first classifier."""

    chunk_size = property(lambda self: 2 if self.shrink else len(self.pixel_values))  # the same on every machine
    features: Tensor | None = None

    def on_features(self, features: Tensor) -> None:
        if self.features is None:
            self.features = features

    def judge(self, exit: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows == exit, torch.zeros_like(self.rows, dtype=torch.float32)


def can_shrink(model: nn.Module, pixel_values: Tensor) -> bool:
    """Find out whether a network can continue with fewer rows; warn with the reason if it cannot.

    It cannot if a path of its graph bypasses a stage, or if an image's logits depend on the rest of the batch. A few
    random inputs that differ in brightness and contrast run once in a shrinking batch and once in a complete one: one
    exits at each exit and two reach the end.

    Args:
        model: A multi-exit model for classification.
        pixel_values: Images ``(batch, channels, height, width)``; only size and device are used.
    """
    images = _random_images(model.num_exits + 1, pixel_values[:1].to(model.dtype))
    policy = ExitPolicy(thresholds=[0.0] * (model.num_exits - 1))
    complete, shrinking = (_Rehearsal(model, policy, images, shrink=shrink) for shrink in (False, True))
    with torch.autocast(images.device.type, enabled=False):
        expected = complete.route()
        try:
            found = shrinking.route()
        except Exception as error:  # of any kind: this network does not run on fewer rows
            reason = f"{type(error).__name__}: {error}"
        else:
            features = complete.features[complete.rows]
            if _agree(found.logits, expected.logits) and _agree(shrinking.features, features):
                return True
            reason = "the logits of the remaining images change"
    warnings.warn(
        f"This network cannot continue with part of a batch ({reason}). Each batch runs until its last image has "
        "exited.",
        stacklevel=6,
    )
    return False


def _random_images(num_images: int, like: Tensor) -> Tensor:
    """Draw noise of different brightness and contrast, always the same, without using the global random state."""
    images = torch.randn(num_images, *like.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu")
    steps = torch.linspace(-1, 1, num_images, device="cpu").view(-1, 1, 1, 1)
    return (images * 2**steps + steps).to(like)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether rows are equal up to rounding; other rows would differ as much as rows differ from each other."""
    if found.shape != expected.shape:
        return False
    tolerance = 0.01 if expected.dtype.itemsize >= 4 else 0.1
    found, expected = found.float(), expected.float()
    spread = (expected - expected.mean(dim=0)).norm()
    return bool((found - expected).norm() <= tolerance * spread)
