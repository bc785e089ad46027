"""Export of one exit of a multi-exit model as a smaller static model, or of all exits as one."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.timm_quirks import copy_module
from .segments import AllExits

# protobuf allows ONNX files of up to 2 GiB; larger weights go to a second file beside it.
MAX_ONNX_BYTES = 2**31 - 2**20


class StaticExit(nn.Module):
    """A model up to one exit: without the layers after it and without the other exits' heads.

    Args:
        model: A multi-exit model for classification; it is copied, not changed.
        exit: Index of the exit, from 0; the final exit is the complete backbone.

    Raises:
        ValueError: If the model has no such exit.
    """

    def __init__(self, model: PreTrainedModel, exit: int):
        super().__init__()
        if not 0 <= exit < model.num_exits:
            raise ValueError(
                f"{model.config.backbone} has {model.num_exits} exits (0 to {model.num_exits - 1}), "
                f"but got exit={exit}."
            )
        self.backbone = copy_module(model.backbone)
        self.head = None
        if exit < model.num_exits - 1:
            self.head = copy.deepcopy(model.exits[exit])
            stage = model.exit_stages[exit]
            self.indices = self.backbone.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for images ``(batch, channels, height, width)``."""
        if self.head is None:
            return self.backbone(pixel_values)
        (feature_map,) = self.backbone.forward_intermediates(
            pixel_values, indices=self.indices, intermediates_only=True, stop_early=True
        )
        return self.head(feature_map)[0]


def export_exit(
    model: PreTrainedModel,
    exit: int,
    path: str | Path,
    *,
    format: str = "onnx",
    image_size: int | tuple[int, int] | None = None,
) -> Path:
    """Export one exit as a static model for any batch size, and verify the file.

    The file maps ``pixel_values``, ``(batch, channels, height, width)`` in float32, to ``logits``,
    ``(batch, classes)``. It is run on one image and on three (an ONNX file with onnxruntime), and its logits are
    compared with the model's. The layers after the exit are removed by timm's ``prune_intermediate_layers``.

    Args:
        model: A multi-exit model for classification.
        exit: Index of the exit, from 0.
        path: Path of the file; that of a torch program must end in ``.pt2``.
        format: ``"onnx"``, or ``"torch"`` for what ``torch.export.load`` reads.
        image_size: Side of the images, or height and width, in pixels; ``None`` for
            ``config.pretrained_cfg["input_size"]``.

    Returns:
        The path.

    Raises:
        ValueError: If the exit or the format does not exist, or the path has the wrong ending.
        ImportError: If a package for ONNX is not installed.
        RuntimeError: If the logits of the file differ from the model's.
    """
    writers = {"onnx": _write_onnx, "torch": _write_torch}
    if format not in writers:
        raise ValueError(f"format must be one of {', '.join(writers)}, but got {format!r}.")
    path = Path(path)
    if format == "torch" and path.suffix != ".pt2":
        raise ValueError(f"A torch program needs a path that ends in .pt2, but got {path}.")
    original, images = _copy_and_images(model, image_size)
    static = StaticExit(original, exit)
    with torch.no_grad():
        exported = writers[format](static, images[:2], path)
        for batch in (images[:1], images):
            expected = original(batch, output_hidden_states=True, return_dict=True).exit_logits[exit]
            _compare(path, f"logits of exit {exit}", exported(batch)[0], expected)
    return path


def import_onnx() -> tuple[ModuleType, ModuleType]:
    """Import ``onnx`` and ``onnxruntime``.

    Raises:
        ImportError: If one of the packages for ONNX is not installed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX needs onnx, onnxscript and onnxruntime. Run pip install hf_selfkd[export].") from error
    return onnx, onnxruntime


def _write_torch(static: StaticExit, images: Tensor, path: Path) -> Callable[[Tensor], Any]:
    program = torch.export.export(static, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    program = torch.export.load(path).module()
    return lambda batch: [program(batch)]


def _write_onnx(
    static: nn.Module, images: Tensor, path: Path, outputs: Sequence[str] = ("logits",)
) -> Callable[[Tensor], Any]:
    _, onnxruntime = import_onnx()
    num_bytes = sum(tensor.nbytes for tensor in static.state_dict().values())
    torch.onnx.export(
        static,
        (images,),
        path,
        input_names=["pixel_values"],
        output_names=[*outputs],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=num_bytes > MAX_ONNX_BYTES,
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: [*map(torch.from_numpy, session.run(outputs, {"pixel_values": batch.numpy()}))]


class _NamedExits(nn.Module):
    """The logits of all exits and their mean, by name."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.exits = AllExits(model)
        self.eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        logits = self.exits(pixel_values)
        return *logits, torch.stack(logits).mean(dim=0)


def export_exits(model: PreTrainedModel, path: str | Path, *, image_size: int | tuple[int, int] | None = None) -> Path:
    """Export all exits as one static ONNX file for any batch size, and verify it as :func:`export_exit` does.

    The file maps ``pixel_values``, ``(batch, channels, height, width)`` in float32, to ``logits_0``, ``logits_1``, ...
    (first exit to final) and ``ensemble``, their mean, each ``(batch, classes)``.

    Args:
        model: A multi-exit model for classification.
        path: Path of the file.
        image_size: Side of the images, or height and width, in pixels; ``None`` for
            ``config.pretrained_cfg["input_size"]``.

    Returns:
        The path.

    Raises:
        ImportError: If a package for ONNX is not installed.
        RuntimeError: If the logits of the file differ from the model's.
    """
    path = Path(path)
    original, images = _copy_and_images(model, image_size)
    names = [*(f"logits_{exit}" for exit in range(model.num_exits)), "ensemble"]
    with torch.no_grad():
        exported = _write_onnx(_NamedExits(original), images[:2], path, names)
        for batch in (images[:1], images):
            expected = _NamedExits(original)(batch)
            for name, found, wanted in zip(names, exported(batch), expected, strict=True):
                _compare(path, name, found, wanted)
    return path


def _copy_and_images(
    model: PreTrainedModel, image_size: int | tuple[int, int] | None
) -> tuple[PreTrainedModel, Tensor]:
    """Return a copy of the model in float32 on the CPU, and three random images."""
    channels, height, width = model.config.pretrained_cfg["input_size"]
    if image_size is not None:
        height, width = to_2tuple(image_size)
    images = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(0))
    return copy_module(model).to("cpu", torch.float32).eval(), images


def _compare(path: Path, name: str, found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs().max().item()
    if not error <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise RuntimeError(f"The output {name} of {path} differs by {error:.3g} from the model's.")
