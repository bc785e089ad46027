"""Early exit with torch alone: a folder with one program per exit, which :class:`EarlyExit` runs.

This file is copied into the folder, and needs nothing but torch.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class EarlyExit:
    """The programs of a folder.

    Args:
        folder: Folder that ``export_early_exit(..., format="torch")`` wrote.
        device: Device to run on.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        self.metadata = json.loads((Path(folder) / "early_exit.json").read_text(encoding="utf-8"))
        self.thresholds = self.metadata["thresholds"]
        self.shrink = self.metadata["shrink"]
        files = [Path(folder) / f"step_{exit}.pt2" for exit in range(len(self.thresholds) + 1)]
        self.steps = [torch.export.load(file).module().to(device) for file in files]

    @torch.no_grad()
    def __call__(
        self, pixel_values: Tensor, thresholds: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classify images.

        Args:
            pixel_values: ``(batch, channels, height, width)``, normalised.
            thresholds: One per auxiliary exit; ``None`` for those of the folder.

        Returns:
            Logits ``(batch, classes)``, exit index and confidence ``(batch,)``.
        """
        rows = torch.arange(len(pixel_values), device=pixel_values.device)
        thresholds = [*(self.thresholds if thresholds is None else thresholds), float("-inf")]
        tensors, found = [pixel_values], []
        for exit, (step, threshold) in enumerate(zip(self.steps, thresholds, strict=True)):
            logits, score, confidence, *tensors = step(*tensors)
            here = slice(None) if self.shrink else rows
            logits, score, confidence = logits[here], score[here], confidence[here]
            exits = score >= threshold if exit < len(self.steps) - 1 else torch.ones_like(rows, dtype=torch.bool)
            found.append((logits[exits], torch.full_like(rows[exits], exit), confidence[exits], rows[exits]))
            rows = rows[~exits]
            if not len(rows):
                break
            if self.shrink:
                tensors = [tensor[~exits] for tensor in tensors]
        logits, index, confidence, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = rows.argsort()
        return logits[order], index[order], confidence[order]
