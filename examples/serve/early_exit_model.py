"""A model from `export_early_exit`, run with onnxruntime, numpy and Pillow alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class EarlyExitModel:
    """An ONNX file that exits early; everything it needs is in its metadata.

    Args:
        path: The file.
        threads: Threads that a batch may use; 0 for all cores.
    """

    def __init__(self, path: str | Path, threads: int = 0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # onnxruntime warns of the default value of the thresholds
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "thresholds" not in metadata:
            raise ValueError(f"{path} was not written by export_early_exit: its metadata has no thresholds.")
        metadata = {name: json.loads(value) for name, value in metadata.items()}
        self.labels: list[str] = metadata["labels"]
        self.thresholds: list[float] = metadata["thresholds"]
        self.num_exits = len(self.thresholds) + 1
        # How many calibration images exited at each exit, if the policy was calibrated.
        self.exit_counts: list[int] | None = (metadata.get("calibration") or {}).get("exit_counts")
        self.read_preprocessing(metadata)

    def read_preprocessing(self, metadata: dict) -> None:
        """Read how images become tensors, in timm's terms.

        Raises:
            ValueError: If the crop mode is unknown.
        """
        self.channels, self.height, self.width = metadata["input_size"]
        self.crop_pct, self.crop_mode = metadata["crop_pct"], metadata["crop_mode"]
        if self.crop_mode not in ("center", "squash"):
            raise ValueError(f"crop_mode must be center or squash, but the file has {self.crop_mode!r}.")
        self.resampling = RESAMPLING[metadata["interpolation"]]
        self.mean, self.std = np.float32(metadata["mean"]), np.float32(metadata["std"])

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Turn an image into ``(channels, height, width)`` in float32, as timm does for evaluation."""
        image = ImageOps.exif_transpose(image).convert("L" if self.channels == 1 else "RGB")
        image = image.resize(self._resized(*image.size), self.resampling)
        left, top = round((image.width - self.width) / 2), round((image.height - self.height) / 2)
        image = image.crop((left, top, left + self.width, top + self.height))
        pixels = np.asarray(image, dtype=np.float32).reshape(self.height, self.width, self.channels) / 255
        return ((pixels - self.mean) / self.std).transpose(2, 0, 1)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that an image is resized to before it is cropped."""
        new_width, new_height = (math.floor(side / self.crop_pct) for side in (self.width, self.height))
        if self.crop_mode == "squash":
            return new_width, new_height
        if new_width != new_height:
            scale = max(new_width / width, new_height / height)
            return round(width * scale), round(height * scale)
        if width <= height:
            return new_width, int(new_width * height / width)
        return int(new_height * width / height), new_height

    def predict(
        self, pixel_values: np.ndarray, thresholds: Sequence[float] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classify a batch.

        Args:
            pixel_values: ``(batch, channels, height, width)``.
            thresholds: One per auxiliary exit; ``None`` for those of the file.

        Returns:
            Class indices, confidences and exits, each ``(batch,)``.
        """
        inputs = {"pixel_values": np.float32(pixel_values)}
        if thresholds is not None:
            inputs["thresholds"] = self.check_thresholds(thresholds)
        logits, exits, confidences = self.session.run(["logits", "exit_index", "confidence"], inputs)
        return logits.argmax(axis=1), confidences, exits

    def check_thresholds(self, thresholds: Sequence[float]) -> np.ndarray:
        """Return thresholds as the file takes them.

        Raises:
            ValueError: If there is not one per auxiliary exit, or one is negative or no number.
        """
        if len(thresholds) != len(self.thresholds) or not all(value >= 0 for value in thresholds):
            raise ValueError(
                f"The model needs {len(self.thresholds)} thresholds of at least 0, one per auxiliary exit, but got "
                f"{list(thresholds)}."
            )
        return np.float32(thresholds)
