"""Unreadable images are refused or left out as the example's help says, with their index and file."""

import io

import data
import numpy as np
import pytest
import torch
import train_segmentation
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from hf_selfkd.training import SeededDataset
from tests.helpers.runs import check_of


def encode(image: PILImage.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: int = 32) -> PILImage.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


def bomb() -> bytes:
    """Return a PNG of a few bytes that claims to have 400 million pixels."""
    head = encode(PILImage.new("1", (1, 1)))
    return head[:16] + (20_000).to_bytes(4, "big") * 2 + head[24:]


INTACT = encode(noise())
BAD = {
    "truncated PNG": INTACT[:-200],
    "truncated JPEG": encode(noise(), "JPEG")[:400],
    "zero bytes": b"",
    "text": b"not an image",
    "broken header": INTACT[:20] + b"\xff\xff\xff\xff" + INTACT[24:],
    "decompression bomb": bomb(),
    "null": None,
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD)
def test_refused(kind):
    rows = [{"image": {"bytes": INTACT, "path": "a.png"}, "label": 0}]
    rows.append({"image": None if BAD[kind] is None else {"bytes": BAD[kind], "path": "b.png"}, "label": 1})
    samples = SeededDataset(data.LabelledImages(rows, lambda image: image), 0, check_of(2, "evaluation"))
    assert samples[0]["pixel_values"].mode == "RGB"
    words = "the row holds no image" if BAD[kind] is None else r"b\.png is not a readable image \(.+\)"
    with pytest.raises(ValueError, match=rf"^Sample 1 of the evaluation data cannot be read: {words}"):
        samples[1]


def test_handled(tmp_path):
    frames = [PILImage.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animated = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(data.read_image({"bytes": animated, "path": None}))[0, 0].tolist() == [255, 0, 0]
    cmyk = data.read_image({"bytes": encode(noise("CMYK"), "JPEG", quality=100), "path": None})
    assert np.abs(np.asarray(cmyk).astype(int) - np.asarray(noise("CMYK").convert("RGB"))).mean() < 10
    deep = PILImage.fromarray(np.array([[0, 25700, 65535]], dtype=np.uint16))
    assert np.asarray(data.read_image({"bytes": encode(deep), "path": None}))[0, :, 2].tolist() == [0, 100, 255]
    dot = data.read_image({"bytes": encode(noise(size=1)), "path": None})
    config = {"interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert data.training_transform(data.DataArguments(), config)(dot).shape == (3, 32, 32)


@pytest.fixture
def folder(tmp_path):
    """Write parquet files with six images, of which two in training cannot be read."""
    contents = {"train": [INTACT, BAD["truncated PNG"], INTACT, b"", INTACT, INTACT], "test": [INTACT, b"x", INTACT]}
    for name, images in contents.items():
        rows = {"image": [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]}
        rows |= {"label": [index % 2 for index in range(len(images))]}
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    return str(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_training_images_are_left_out_counted_and_listed(folder, capsys, workers):
    images, _ = data.load_images(data.DataArguments(dataset=folder, skip_bad_images=2), workers)
    printed = capsys.readouterr().out
    assert "--skip_bad_images: left out 2 of 6 training images:\n  row 1: 1.png is not a readable image (" in printed
    assert "\n  row 3: 3.png is not a readable image (" in printed
    assert images["train"]["label"][:] == [0, 0, 0, 1]
    assert len(images["test"]) == 3  # evaluation skips none
    with pytest.raises(ValueError, match="^1.png is not a readable image"):
        data.LabelledImages(images["test"], lambda image: image)[1]


def test_more_bad_images_than_allowed_are_listed(folder):
    with pytest.raises(
        ValueError, match=r"^2 training images cannot be read, but --skip_bad_images is 1:\n  row 1: 1.png"
    ):
        data.load_images(data.DataArguments(dataset=folder, skip_bad_images=1))


def test_without_the_option_nothing_is_left_out(folder):
    assert len(data.load_images(data.DataArguments(dataset=folder))[0]["train"]) == 6


def test_bad_rows_of_segmentation(tmp_path, capsys):
    label = encode(PILImage.new("L", (32, 32), 1))
    deep = encode(PILImage.fromarray(np.full((32, 32), 25700, dtype=np.uint16)))
    images, labels = [INTACT, b"", deep, INTACT], [label, label, label, encode(noise())]
    for name in ("train", "test"):
        rows = {"image": images, "label": labels}
        rows = {column: [{"bytes": value, "path": None} for value in values] for column, values in rows.items()}
        split = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Image()}))
        (split if name == "train" else split.select([0])).to_parquet(tmp_path / f"{name}.parquet")
    options = train_segmentation.SegmentationData(dataset=str(tmp_path), skip_bad_images=2, evaluation_split="test")
    training, _, names = train_segmentation.load_maps(options)
    assert "row 3: a label map must hold one class index per pixel" in capsys.readouterr().out
    assert names == ["0", "1"]
    image, label = train_segmentation.read_row(training[1])
    assert np.asarray(image).max() == 100
    assert torch.equal(label, torch.ones(32, 32, dtype=torch.long))
