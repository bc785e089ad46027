"""Export of early exit itself: a file in which each image of a batch runs no further than its exit."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm.data
import torch
from timm.layers import to_2tuple
from torch import Tensor
from transformers import PreTrainedModel

from .._version import __version__
from ..models.exit_policy import ExitPolicy, get_criterion, resolve_policy
from ..models.multi_label import MULTI_LABEL
from ..models.timm_quirks import copy_module
from . import torch_early_exit
from .export_exit import MAX_ONNX_BYTES, import_onnx
from .segments import CannotCut, Segment, check_shrinks, cut_at_exits
from .steps import Step, build_steps

# Batches on which a file is compared with the model.
CHECKED_BATCHES = (1, 2, 7, 16)
# Up to this batch also with all images at the same exit, which takes time with the larger ones and finds nothing more.
LARGEST_FORCED_BATCH = 2
# Scores that are closer may change their order between runtimes.
ROUNDING = 1e-5
# Largest difference of the logits there, as a share of the largest logit.
TOLERANCE = 1e-4

Runner = Callable[[Tensor, Sequence[float]], tuple[Tensor, Tensor, Tensor]]


def export_early_exit(
    model: PreTrainedModel,
    path: str | Path,
    policy: ExitPolicy | None = None,
    *,
    format: str = "onnx",
    image_size: int | tuple[int, int] | None = None,
    shrink: bool = True,
) -> Path:
    """Export a model with its exit policy, so that it exits early where this library is not installed.

    ONNX: one file from ``pixel_values``, ``(batch, channels, height, width)`` in float32, and ``thresholds``, one per
    auxiliary exit, those of the policy unless given, to ``logits``, ``(batch, classes)``, ``exit_index`` and
    ``confidence``, ``(batch,)``. Behind each exit the network continues with the images that are left, inside an
    ``If``. Weights of 2 GiB and more go to a second file beside it.

    Torch: a folder with one ``torch.export`` program per exit and ``early_exit.py``, which runs them and needs torch
    only.

    Criterion and temperatures are fixed in the file. Its metadata (in ONNX its ``metadata_props``, in the folder
    ``early_exit.json``; each value is JSON) has class names, ``input_size``, ``mean``, ``std`` and the other
    preprocessing of the model, criterion, thresholds and temperatures.

    The file is run, in ONNX with onnxruntime, on batches of 1, 2, 7 and 16 random images, with thresholds at which
    every exit occurs, and compared with :meth:`~MultiExitForImageClassification.early_exit`.

    Args:
        model: A multi-exit model for classification.
        path: Path of the ONNX file, or of the folder of torch programs, which must not exist.
        policy: Decides when an image exits; ``None`` for ``config.exit_policy``.
        format: ``"onnx"`` or ``"torch"``.
        image_size: Side of the images, or height and width, in pixels; ``None`` for
            ``config.pretrained_cfg["input_size"]``.
        shrink: Whether the network continues with the remaining images only. ``False`` is for runtimes without shapes
            that depend on data, such as TensorRT: the complete batch runs until its last image has exited. So it is,
            with a warning, for a network that cannot continue with part of a batch.

    Returns:
        The path.

    Raises:
        ValueError: If the model is not for classification, the policy is missing or for another number of exits, the
            format does not exist, or the folder does.
        ImportError: If a package for ONNX is not installed.
        RuntimeError: If exits or logits of the file differ from the model's; no file is left.
    """
    writers = {"onnx": _write_onnx, "torch": _write_torch}
    if format not in writers:
        raise ValueError(f"format must be one of {', '.join(writers)}, but got {format!r}.")
    if model.task not in ("image-classification", MULTI_LABEL):
        raise ValueError(f"Only models for classification exit early, but this one is for {model.task}.")
    path = Path(path)
    if format == "torch" and path.exists():
        raise ValueError(f"Torch programs go to a new folder, but {path} exists. Remove it or choose another.")
    policy = resolve_policy(policy, model.config.exit_policy, model.num_exits, multi_label=model.config.is_multi_label)
    original = copy_module(model).to("cpu", torch.float32).eval()
    height, width = model.config.pretrained_cfg["input_size"][1:] if image_size is None else to_2tuple(image_size)
    segments = cut_at_exits(original, (height, width))
    images = _unlike_images(segments[0].examples[0].shape[1:])
    shrink = shrink and _can_shrink(segments)
    metadata = _metadata(original, policy, (height, width), shrink)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as place:
        draft = Path(place) / path.name
        run = writers[format](build_steps(segments, policy), policy, metadata, draft)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where the file shrinks batches, the model itself may not
            _check(original, policy, run, images)
        for file in Path(place).iterdir():
            shutil.move(file, path.parent / file.name)
    return path


def _unlike_images(shape: Sequence[int]) -> Tensor:
    """Return random images of rising contrast, so that their scores differ."""
    count = max(CHECKED_BATCHES)
    contrast = torch.linspace(0.3, 3, count)[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    return images * contrast.view(-1, 1, 1, 1)


def _can_shrink(segments: Sequence[Segment]) -> bool:
    try:
        check_shrinks(segments)
    except CannotCut as error:
        warnings.warn(f"{error} The file runs each batch until its last image has exited.", stacklevel=3)
        return False
    return True


def _metadata(model: PreTrainedModel, policy: ExitPolicy, image_size: tuple[int, int], shrink: bool) -> dict[str, Any]:
    channels = model.config.pretrained_cfg["input_size"][0]
    data = timm.data.resolve_data_config(model.config.pretrained_cfg)  # with timm's defaults, as the image processor
    data["input_size"] = [channels, *image_size]
    return {
        "labels": [model.config.id2label[index] for index in range(model.config.num_labels)],
        **{name: data[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")},
        **policy.to_dict(),
        "shrink": shrink,
        "backbone": model.config.backbone,
        "hf_selfkd_version": __version__,
    }


# Formats


def _write_onnx(steps: Sequence[Step], policy: ExitPolicy, metadata: dict[str, Any], path: Path) -> Runner:
    onnx, onnxruntime = import_onnx()
    from .onnx_early_exit import assemble, write_step

    texts = {name: json.dumps(value) for name, value in metadata.items()}
    file = assemble([write_step(step) for step in steps], policy.thresholds, texts, shrink=metadata["shrink"])
    is_large = file.ByteSize() > MAX_ONNX_BYTES
    onnx.save_model(file, path, save_as_external_data=is_large, location=f"{path.name}.data" if is_large else None)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of the default that the thresholds have
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        inputs = {"pixel_values": images.numpy(), "thresholds": torch.tensor(thresholds).float().numpy()}
        return tuple(map(torch.from_numpy, session.run(["logits", "exit_index", "confidence"], inputs)))

    return run


def _write_torch(steps: Sequence[Step], policy: ExitPolicy, metadata: dict[str, Any], path: Path) -> Runner:
    path.mkdir()
    for exit, step in enumerate(steps):
        program = torch.export.export(step, step.examples, dynamic_shapes=step.dynamic_shapes)
        torch.export.save(program, path / f"step_{exit}.pt2")
    (path / "early_exit.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    shutil.copy(torch_early_exit.__file__, path / "early_exit.py")
    return torch_early_exit.EarlyExit(path)


# Comparison with the model


@torch.no_grad()
def _check(model: PreTrainedModel, policy: ExitPolicy, run: Runner, images: Tensor) -> None:
    for count in CHECKED_BATCHES:
        batch = images[:count]
        for thresholds in _settings(model, policy, batch):
            expected = model.early_exit(batch, replace(policy, thresholds=thresholds))
            logits, exit_index, confidence = run(batch, thresholds)
            if not torch.equal(exit_index, expected.exit_index):
                raise RuntimeError(
                    f"With thresholds {thresholds} the exits of the exported file are {exit_index.tolist()}, those of "
                    f"the model {expected.exit_index.tolist()}. Nothing was written."
                )
            for name, found in (("logits", logits), ("confidence", confidence)):
                scale = expected[name].abs().max().item()
                error = (found - expected[name]).abs().max().item()
                if not error <= TOLERANCE * scale:
                    raise RuntimeError(
                        f"The {name} of the exported file differ by {error:.3g} from those of the model, which reach "
                        f"{scale:.3g}. Nothing was written."
                    )


def _settings(model: PreTrainedModel, policy: ExitPolicy, batch: Tensor) -> Iterator[list[float]]:
    """Yield thresholds at which the images spread over the exits, and those at which all exit at the same one."""
    num_early = model.num_exits - 1
    never = get_criterion(policy.criterion).never(model.num_exits)
    if len(batch) <= LARGEST_FORCED_BATCH:
        for exit in range(model.num_exits):
            yield [never] * exit + [0.0] * (num_early - exit)
    thresholds, history = [], None
    left = torch.ones(len(batch), dtype=torch.bool)
    for exit, logits in enumerate(model(batch, output_hidden_states=True, return_dict=True).exit_logits[:-1]):
        scores, _, history = policy.score(exit, logits, history)
        thresholds.append(_between(scores[left], 1 / (num_early + 1 - exit)) if left.any() else never)
        left &= scores < thresholds[-1]
    yield thresholds


def _between(scores: Tensor, share: float) -> float:
    """Return a threshold that about a share of the scores reaches, in a gap so wide that rounding changes nothing."""
    found = scores.unique()
    places = torch.arange(1, len(found))
    gaps = found.diff()
    distances = (places - len(found) * (1 - share)).abs().masked_fill(gaps <= ROUNDING, torch.inf)
    if not distances.isfinite().any():
        return found[-1].item() + 1
    place = distances.argmin()
    return found[place : place + 2].mean().item()
