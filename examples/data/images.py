"""Decode images of any mode and pair them with their labels."""

import io
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image as PILImage
from PIL import ImageOps

from hf_selfkd.training import SeededStream


class LabelledImages(torch.utils.data.Dataset):
    """Decodes images as RGB, applies ``transform``, and names the file of an unreadable one.

    Args:
        rows: A dataset with the columns ``image`` (encoded) and ``label``.
        transform: From a PIL image to a tensor ``(3, height, width)``.
    """

    def __init__(self, rows: Dataset, transform):
        self.rows = rows
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _read(self.rows[index], self.transform)


def labelled_images(rows: Dataset | IterableDataset, transform, *, num_rows: int | None = None, buffer_size: int = 1):
    """Return the samples of :class:`LabelledImages`, as a stream if the rows are one."""
    if not isinstance(rows, IterableDataset):
        return LabelledImages(rows, transform)
    splits = rows.info.splits or {}
    known = splits[rows.split].num_examples if rows.split in splits else None

    read = partial(_read, transform=transform)
    return SeededStream(rows, read, _encoded, num_rows=num_rows or known, buffer_size=buffer_size)


def _read(row: dict[str, Any], transform) -> dict[str, Any]:
    image, label = read_row(row)
    return {"pixel_values": transform(image), "labels": label}


def _encoded(row: dict[str, Any]) -> bytes:
    return row["image"]["bytes"] or row["image"]["path"].encode()


def read_row(row: dict[str, Any]) -> tuple[PILImage.Image, int]:
    """Return the image as RGB and its label."""
    return read_image(row["image"]), row["label"]


def read_image(encoded: dict[str, Any] | None) -> PILImage.Image:
    """Decode an image as RGB, whatever its mode, turned as EXIF says; of an animation the first frame.

    Raises:
        ValueError: If it is not an image, is truncated, or has more than 179 million pixels, which Pillow treats as a
            decompression bomb. Names the file where there is one.
    """
    if encoded is None:
        raise ValueError("the row holds no image.")
    source = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
    try:
        return as_rgb(ImageOps.exif_transpose(PILImage.open(source)))  # as datasets and pipelines do
    except Exception as error:  # Pillow's decoders raise all kinds
        raise ValueError(f"{encoded['path'] or 'an embedded image'} is not a readable image ({error}).") from error


def as_rgb(image: PILImage.Image) -> PILImage.Image:
    """Convert an image of any mode; 16 bits are scaled to 8, where Pillow would clip them."""
    if image.mode.startswith("I"):
        image = PILImage.fromarray((np.asarray(image).clip(0, 65535) // 257).astype("uint8"))
    return image.convert("RGB")
