"""Whether a network can be cut at its exits, for early exit in other runtimes."""

from typing import Any

import torch

from hf_selfkd import MultiExitForImageClassification
from hf_selfkd.deploy.segments import CannotCut, check_shrinks, cut_at_exits


@torch.no_grad()
def cut(name: str) -> dict[str, Any]:
    """Cut a network, run its parts one after the other, and check that they continue with fewer images."""
    torch.manual_seed(0)
    model = MultiExitForImageClassification.from_backbone(name, num_labels=10).eval()
    channels, *size = model.config.pretrained_cfg["input_size"]
    segments = cut_at_exits(model, tuple(size))
    images = torch.randn(3, channels, *size)
    expected = model(images, output_hidden_states=True).exit_logits
    tensors, error = (images,), 0.0
    for segment, wanted in zip(segments, expected, strict=True):
        logits, *tensors = segment.module(*tensors)
        error = max(error, ((logits - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item())
    results = {
        "image": [channels, *size],
        "crossing": [len(segment.examples) for segment in segments[1:]],
        "error": error,
        "logits": True if error <= 1e-4 else f"differ by {error:.1e} of the largest",
        "continues": True,
    }
    try:
        check_shrinks(segments)
    except CannotCut as reason:
        results["continues"] = str(reason)
    return results
