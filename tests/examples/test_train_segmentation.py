"""The segmentation example on a small dataset that it reads from disk."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_segmentation
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

import hf_selfkd  # noqa: F401  registers the model

EXAMPLES = Path(train_segmentation.__file__).parent
FAST = ["--backbone", "test_resnet", "--pyramid_width", "8", "--use_cpu", "true", "--disable_tqdm", "true"]
SIZE = ["--image_size", "32", "64", "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "1"]


def run(*arguments):
    train_segmentation.main([*FAST, *SIZE, "--report_to", "none", *map(str, arguments)])


def rows(count: int, size: tuple[int, int] = (40, 72), map_mode: str = "L"):
    """Images whose left half is dark (class 0) and right half bright (class 1), with ignored pixels (9) on top."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        label = np.zeros(size, dtype=np.uint8)
        label[:, size[1] // 2 :] = 1
        pixels = generator.integers(0, 80, (*size, 3)) + 150 * label[..., None]
        label[:3] = 9
        yield {
            "image": PILImage.fromarray(pixels.astype(np.uint8)),
            "label": PILImage.fromarray(label).convert(map_mode),
        }


def write(folder: Path, **splits) -> Path:
    folder.mkdir(parents=True)
    for name, examples in splits.items():
        features = Features({"image": Image(), "label": Image()})
        Dataset.from_list(list(examples), features=features).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation")
    data = write(folder / "data", train=rows(6), validation=rows(5, (50, 61)))
    options = ["--dataset", data, "--output_dir", folder / "run", "--ignore_index", 9, "--num_pictures", 2]
    run(*options, "--class_names", '["dark", "bright", "never"]', "--num_train_epochs", 2, "--learning_rate", 0.02)
    return folder


def test_checkpoint_has_the_metrics_that_training_reported(trained):
    metrics = json.loads((trained / "run" / "eval_results.json").read_text())
    model = AutoModelForSemanticSegmentation.from_pretrained(trained / "run").eval()
    processor = AutoImageProcessor.from_pretrained(trained / "run")
    correct = union = 0
    for row in rows(5, (50, 61)):
        inputs = processor(row["image"], row["label"], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        labels = inputs["labels"][0]
        predicted = processor.post_process_semantic_segmentation(output, [tuple(labels.shape)])[0][labels != 9]
        labels = labels[labels != 9]
        classes = torch.arange(3)[:, None]
        correct += ((predicted == classes) & (labels == classes)).sum(1)
        union += ((predicted == classes) | (labels == classes)).sum(1)
    assert metrics["eval_mean_iou"] == pytest.approx((correct / union)[union > 0].mean().item(), abs=0.01)
    assert model.config.id2label == {0: "dark", 1: "bright", 2: "never"}


def test_the_pipeline_segments_in_the_size_of_the_image(trained):
    image = next(rows(1))["image"]
    segments = pipeline("image-segmentation", model=str(trained / "run"))(image)
    assert {segment["label"] for segment in segments} <= {"dark", "bright", "never"}
    assert all(segment["mask"].size == image.size for segment in segments)


def test_pictures_show_image_label_and_prediction(trained):
    pictures = sorted((trained / "run" / "pictures").glob("*.png"))
    assert [path.name for path in pictures] == ["0.png", "1.png"]
    first = next(rows(5, (50, 61)))
    image, label, predicted = np.split(np.array(PILImage.open(pictures[0])), 3, axis=1)
    assert np.array_equal(image, np.array(first["image"]))
    colours = train_segmentation.palette(3)
    expected = np.array(first["label"]).astype(int)
    expected[expected == 9] = 3
    assert np.array_equal(label, colours[expected])
    assert (predicted[:3] == 0).all()  # ignored pixels are black in both
    assert (predicted[3:, :, None] == colours[:3]).all(-1).any(-1).all()


def test_palette_has_a_colour_per_class_and_black_for_ignored_pixels():
    colours = train_segmentation.palette(150)
    assert len({tuple(colour) for colour in colours}) == 151
    assert tuple(colours[-1]) == (0, 0, 0)
    assert colours[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]  # those of PASCAL VOC


def test_training_transform_moves_image_and_map_together():
    options = train_segmentation.SegmentationData(dataset="", image_size=[40, 72], crop_size=[32, 48], ignore_index=9)
    transform, _ = train_segmentation.transforms(
        options, {"interpolation": "bilinear", "mean": [0] * 3, "std": [1] * 3}
    )
    samples = train_segmentation.LabelledMaps(list(rows(4)), transform)
    for index in range(4):
        sample = samples[index]
        assert sample["pixel_values"].shape == (3, 32, 48)
        assert sample["labels"].shape == (32, 48)
        bright, known = sample["pixel_values"].mean(0) > 0.5, sample["labels"] < 9
        assert (bright == (sample["labels"] == 1))[known].float().mean() > 0.9
        assert set(sample["labels"].unique().tolist()) <= {0, 1, 9}


EVALUATE = """
import json, sys
sys.path.insert(0, {examples!r})
from train_segmentation import LabelledMaps, SegmentationData, load_maps, transforms
from transformers import AutoModelForSemanticSegmentation, TrainingArguments
from hf_selfkd import SelfDistillationTrainer

options = SegmentationData(dataset={data!r}, image_size=[32, 64], ignore_index=9)
_, rows, _ = load_maps(options)
_, transform = transforms(options, {{"interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}})
args = TrainingArguments({output!r}, use_cpu=True, ddp_backend="gloo", per_device_eval_batch_size=1, report_to="none")
model = AutoModelForSemanticSegmentation.from_pretrained({model!r})
trainer = SelfDistillationTrainer(model, args, "none", eval_dataset=LabelledMaps(rows, transform))
assert trainer.args.world_size == {processes}
trainer.save_metrics("eval", trainer.evaluate())
"""


@pytest.mark.slow
def test_two_processes_report_the_metrics_of_one(trained, tmp_path):
    metrics = []
    for processes in (1, 2):
        output, script = tmp_path / str(processes), tmp_path / f"evaluate{processes}.py"
        paths = {"examples": EXAMPLES, "data": trained / "data", "model": trained / "run", "output": output}
        text = {name: str(path) for name, path in paths.items()}
        script.write_text(EVALUATE.format(processes=processes, **text))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        process = subprocess.run([*launcher, str(script)], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-3000:]
        metrics.append(json.loads((output / "eval_results.json").read_text()))
    names = [name for name in metrics[0] if "iou" in name or "pixel" in name]
    assert len(names) == 12
    for name in names:  # of five images: one of the processes sees a sixth, which must not be counted
        assert metrics[1][name] == pytest.approx(metrics[0][name], abs=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (
            {"train": 2},
            {},
            "has the splits train, but none to evaluate on: one of validation, valid, val, test is needed",
        ),
        (
            {"train": 2, "test": 2},
            {"label_column": "mask"},
            "'mask' is not a column of images. Columns: image, label.",
        ),
        ({"train": 2, "test": 2}, {"class_names": '{"0": "sky"}'}, "--class_names must be a JSON list"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, splits, options, message):
    data = write(tmp_path / "data", **{name: rows(count) for name, count in splits.items()})
    with pytest.raises(ValueError) as error:
        train_segmentation.load_maps(train_segmentation.SegmentationData(dataset=str(data), **options))
    assert message in str(error.value)


def test_number_of_classes_is_read_from_the_training_maps(tmp_path):
    data = write(tmp_path / "data", train=rows(3), validation=rows(2), test=rows(1))
    options = train_segmentation.SegmentationData(dataset=str(data), ignore_index=9, max_train_samples=2)
    training, evaluation, names = train_segmentation.load_maps(options)
    assert (len(training), len(evaluation), names) == (2, 2, ["0", "1"])


def test_maps_that_do_not_fit():
    def read(row):
        return train_segmentation.LabelledMaps([row], lambda *both: both)[0]

    with pytest.raises(ValueError, match="one class index per pixel, but is an image of mode RGB"):
        read(next(rows(1, map_mode="RGB")))
    row = next(rows(1))
    with pytest.raises(ValueError, match="the image has 20x72 pixels, but its label map 40x72"):
        read({"image": row["image"].resize((72, 20)), "label": row["label"]})
