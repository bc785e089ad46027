"""One exit of a multi-exit model as a smaller static model, for torch.export and ONNX."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.timm_quirks import copy_module

# ONNX files hold weights up to the 2 GiB that protobuf allows; larger ones get a file of their own beside it.
MAX_ONNX_BYTES = 2**31 - 2**20


class StaticExit(nn.Module):
    """A model cut off behind one exit: it holds nothing that lies deeper, and no head but that exit's.

    Args:
        model: A multi-exit model for classification; it is copied, not changed.
        exit: Which exit, from 0, shallow to deep; the deepest is the whole backbone.

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
        (stage_map,) = self.backbone.forward_intermediates(
            pixel_values, indices=self.indices, intermediates_only=True, stop_early=True
        )
        return self.head(stage_map)[0]


def export_exit(
    model: PreTrainedModel,
    exit: int,
    path: str | Path,
    *,
    format: str = "onnx",
    image_size: int | tuple[int, int] | None = None,
) -> Path:
    """Write one exit as a static model that takes any number of images, and check what was written.

    The file maps ``pixel_values``, ``(batch, channels, height, width)`` in float32, to ``logits``,
    ``(batch, classes)``. It is run on one image and on three, and its answers compared with those of the model, an
    ONNX file's with onnxruntime. All that is left out is what timm's ``prune_intermediate_layers`` leaves out.

    Args:
        model: A multi-exit model for classification.
        exit: Which exit, from 0, shallow to deep.
        path: Where the file goes; a torch program must end in ``.pt2``.
        format: ``"onnx"``, or ``"torch"`` for what ``torch.export.load`` reads.
        image_size: Side of the images, or height and width, in pixels; ``None`` for the one the model is meant for.

    Returns:
        The path.

    Raises:
        ValueError: If the exit or the format does not exist, or the path has the wrong ending.
        ImportError: If ONNX is wanted and not installed.
        RuntimeError: If the file does not answer as the model does.
    """
    writers = {"onnx": _write_onnx, "torch": _write_torch}
    if format not in writers:
        raise ValueError(f"format must be one of {', '.join(writers)}, but got {format!r}.")
    path = Path(path)
    if format == "torch" and path.suffix != ".pt2":
        raise ValueError(f"A torch program needs a path that ends in .pt2, but got {path}.")
    original = copy_module(model).to("cpu", torch.float32).eval()
    static = StaticExit(original, exit)
    channels, height, width = model.config.pretrained_cfg["input_size"]
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer = writers[format](static, images[:2], path)
        for batch in (images[:1], images):
            expected = original(batch, output_hidden_states=True).exit_logits[exit]
            error = (answer(batch) - expected).abs().max().item()
            if not error <= 1e-3 * max(1.0, expected.abs().max().item()):
                raise RuntimeError(f"{path} answers {error:.3g} off what exit {exit} of the model answers.")
    return path


def _write_torch(static: StaticExit, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(static, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_onnx(static: StaticExit, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX needs onnx, onnxscript and onnxruntime. Run pip install hf_selfkd[export].") from error
    num_bytes = sum(tensor.nbytes for tensor in static.state_dict().values())
    torch.onnx.export(
        static,
        (images,),
        path,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=num_bytes > MAX_ONNX_BYTES,
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(["logits"], {"pixel_values": batch.numpy()})[0])
