"""The examples, run as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification, pipeline

import hf_selfkd
from tests.helpers.hub_server import HubServer

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import data  # noqa: E402

FAST = ["--backbone", "test_resnet", "--backbone_kwargs", "{}", "--use_cpu", "true", "--disable_tqdm", "true"]


def run(*arguments, launcher=(sys.executable,), check=True, env=None):
    command = [*launcher, str(EXAMPLES / "train_cifar.py"), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    assert not check or process.returncode == 0, process.stderr[-3000:]
    return process


def write_images(folder: Path, images: dict[str, PILImage.Image]) -> None:
    for index, (name, image) in enumerate(images.items()):
        for split in ("train", "test"):
            path = folder / split / f"class{index % 2}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def noise(mode: str = "RGB") -> PILImage.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Train on the embedded data as the README says, but for fewer epochs of a smaller model, and push it."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1")
    options = ["--dataset", "digits", "--preset", "smoke", "--num_train_epochs", "2", "--max_train_samples", "320"]
    options += ["--push_to_hub", "true", "--hub_private_repo", "true", "--hub_token", "hf_of_ada"]
    with HubServer() as server:
        environment = server.environment(tmp_path_factory.mktemp("home"), token=None)
        process = run(*options, *FAST, "--output_dir", folder, launcher=launcher, env=environment)
    return folder, process.stdout, server.repositories["ada/digits"]


def test_training_ends_with_a_table_and_a_checkpoint_for_pipeline(digits_run):
    folder, printed, _ = digits_run
    metrics = json.loads((folder / "eval_results.json").read_text())
    header, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert header == [
        "exit",
        "accuracy (%)",
        "calibration error (%)",
        "multiply-adds (M)",
        "parameters (M)",
    ]
    model = AutoModelForImageClassification.from_pretrained(folder)
    for exit, (row, cost) in enumerate(zip(rows, hf_selfkd.exit_costs(model), strict=True)):
        assert row[0] == str(exit)
        assert float(row[1]) == pytest.approx(100 * metrics[f"eval_accuracy_exit_{exit}"], abs=0.01)
        assert float(row[3]) == pytest.approx(cost / 1e6, abs=0.01)
    assert float(rows[-1][4]) == pytest.approx(model.num_parameters() / 1e6, abs=0.001)
    card = ModelCard.load(folder / "README.md")
    assert "360 images of scikit-learn digits" in card.text and "| crop_padding | 4 |" in card.text
    found = [result.metric_value for result in card.data.eval_results]
    assert found[:-1] == pytest.approx([metrics[f"eval_accuracy_exit_{exit}"] for exit in range(4)], abs=5e-5)
    answer = pipeline("image-classification", model=str(folder))(noise())
    assert {entry["label"] for entry in answer} <= {str(digit) for digit in range(10)}


def test_the_run_is_on_the_hub(digits_run):
    folder, _, repository = digits_run
    assert repository.private
    files = repository.files()
    assert files.keys() >= {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert "modeling_classification.py" in files
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert repository.messages[-1] == "End of training"
    assert not [name for name, content in files.items() if b"hf_of_ada" in content]


def test_a_loaded_checkpoint_has_the_accuracies_that_training_reported(digits_run):
    folder, _, _ = digits_run
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    images, _ = data.load_images(data.DataArguments(dataset="digits"))
    import timm

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.config.pretrained_cfg))
    samples = [data.LabelledImages(images["test"], transform)[index] for index in range(360)]
    with torch.no_grad():
        output = model(torch.stack([sample["pixel_values"] for sample in samples]))
    labels = torch.tensor([sample["labels"] for sample in samples])
    metrics = json.loads((folder / "eval_results.json").read_text())
    for exit, logits in enumerate(output.exit_logits):
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        assert accuracy == pytest.approx(metrics[f"eval_accuracy_exit_{exit}"], abs=0.003)


def test_a_run_is_never_overwritten_but_resumed(digits_run):
    folder, _, _ = digits_run
    options = ["--dataset", "digits", "--preset", "smoke", "--num_train_epochs", "2", "--max_train_samples", "320"]
    refused = run(*options, *FAST, "--output_dir", folder, check=False)
    assert refused.returncode != 0
    assert "already holds a run. Go on with --resume_from_checkpoint last" in refused.stderr
    before = (folder / "model.safetensors").read_bytes()
    run(*options, *FAST, "--output_dir", folder, "--resume_from_checkpoint", "last")
    assert (folder / "model.safetensors").read_bytes() == before  # the run was over: nothing is left to train


def test_a_folder_of_images_of_every_mode(tmp_path):
    modes = {"RGB": "png", "L": "png", "RGBA": "png", "P": "png", "CMYK": "jpg", "1": "png", "LA": "png"}
    write_images(tmp_path / "images", {f"{mode}.{suffix}": noise(mode) for mode, suffix in modes.items()})
    images, names = data.load_images(data.DataArguments(dataset=str(tmp_path / "images")))
    assert names == ["class0", "class1"]
    assert len(images["train"]) == len(modes)
    for row in images["train"]:
        assert data.read_image(row["image"]).mode == "RGB"
    options = ["--per_device_train_batch_size", "4", "--num_train_epochs", "1", "--lr_milestones", "1"]
    run("--dataset", tmp_path / "images", *FAST, *options, "--output_dir", tmp_path / "run")


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    PILImage.fromarray(np.array([[0, 25700, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    image = data.read_image({"path": str(tmp_path / "deep.png"), "bytes": None})
    assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 255]


def test_cards_name_data_as_people_know_it(tmp_path):
    on_the_hub = data.card_facts(data.DataArguments(dataset="cifar10", mixup=0.2))
    assert on_the_hub["dataset"] == "cifar10" and on_the_hub["dataset_tags"] == "uoft-cs/cifar10"
    assert on_the_hub["recipe"] == {"crop_padding": 4, "horizontal_flip": True, "mixup": 0.2}
    local = data.card_facts(data.DataArguments(dataset=str(tmp_path / "flowers"), horizontal_flip=False))
    assert local == {"dataset": "flowers", "recipe": {"crop_padding": 4}}


def test_a_file_that_is_no_image_is_named_with_its_index(tmp_path):
    write_images(tmp_path / "images", {f"{index}.png": noise() for index in range(6)})
    (tmp_path / "images" / "train" / "class0" / "2.png").write_bytes(b"no image")
    process = run("--dataset", tmp_path / "images", *FAST, "--output_dir", tmp_path / "run", check=False)
    assert process.returncode != 0
    assert "Sample 1 of the training data cannot be read: " in process.stderr
    assert "class0/2.png is no readable image" in process.stderr


def parquet(folder: Path, rows: dict, features: Features | None = None) -> str:
    split = Dataset.from_dict(rows, features=features)
    folder.mkdir()
    for name in ("train", "test"):
        split.to_parquet(folder / f"{name}.parquet")
    return str(folder)


def test_columns_of_a_parquet_folder_are_found_or_named(tmp_path):
    rows = {"picture": [noise()] * 4, "kind": [0, 1, 0, 1], "shade": [1, 1, 0, 0]}
    kinds = ClassLabel(names=["a", "b"])
    folder = parquet(tmp_path / "two", rows, Features(picture=Image(), kind=kinds, shade=kinds))
    with pytest.raises(ValueError, match="More than one label column .* picture, kind, shade. Name it with --label_c"):
        data.load_images(data.DataArguments(dataset=folder))
    images, names = data.load_images(data.DataArguments(dataset=folder, label_column="shade"))
    assert images["train"]["label"][:] == [1, 1, 0, 0]
    assert names == ["a", "b"]
    with pytest.raises(ValueError, match="--label_column 'colour' is not among the columns: picture, kind, shade"):
        data.load_images(data.DataArguments(dataset=folder, label_column="colour"))


def test_a_missing_label_column(tmp_path):
    folder = parquet(tmp_path / "none", {"image": [noise()] * 4, "text": ["x"] * 4}, None)
    with pytest.raises(ValueError, match="No label column was found among image, text. Name it with --label_column"):
        data.load_images(data.DataArguments(dataset=folder))


def test_labels_that_are_no_classes(tmp_path):
    folder = parquet(tmp_path / "text", {"image": [noise()] * 2, "label": ["cat", "dog"]})
    with pytest.raises(ValueError, match="Column 'label' must hold whole numbers from 0 or class labels, but holds"):
        data.load_images(data.DataArguments(dataset=folder))
    folder = parquet(tmp_path / "numbers", {"image": [noise()] * 3, "label": [0, 3, 1]})
    assert data.load_images(data.DataArguments(dataset=folder))[1] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("splits", "words"),
    [({"train": 1}, "none to evaluate on: one of test, validation"), ({"test": 1}, "but none called train")],
)
def test_missing_splits(monkeypatch, splits, words):
    features = Features(image=Image(), label=ClassLabel(names=["a"]))
    split = Dataset.from_dict({"image": [noise()], "label": [0]}, features=features)
    monkeypatch.setattr(data, "_load", lambda name, streaming: DatasetDict({name: split for name in splits}))
    with pytest.raises(ValueError, match=words):
        data.load_images(data.DataArguments(dataset="x"))


def test_without_the_hub_the_way_out_is_named(monkeypatch):
    process = run("--output_dir", "runs/never", *FAST, check=False)
    assert process.returncode != 0
    assert "uoft-cs/cifar100 could not be had from the Hub" in process.stderr
    assert "use --dataset digits, or --dataset with a local folder" in process.stderr
    with pytest.raises(
        ValueError, match="--dataset takes cifar10, cifar100, imagenet-1k, digits or an existing folder, but got 'x'"
    ):
        data.load_images(data.DataArguments(dataset="x"))


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds neither parquet files nor images"):
        data.load_images(data.DataArguments(dataset=str(tmp_path)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "byto"], "Unknown method 'byto'. Did you mean 'byot'?"),
        (["--method_args", '{"alpha": 2}', "--method", "byot"], "BYOT needs 0 <= alpha <= 1, but got alpha=2."),
        (["--method_args", "[1]"], "--method_args must be a JSON dict, but got [1]."),
        (["--method_args", "{alpha: 1}"], "--method_args is not JSON: {alpha: 1}"),
        (["--exits", "[9]"], "test_resnet has 5 stages (0 to 4), but exits asks for stage 9."),
        (["--exits", "[]"], "EED needs at least 2 exits, but the model has 1."),
        (["--backbone", "resnt18"], "Unknown timm model 'resnt18'. Did you mean 'resnet18'"),
        (
            ["--resume_from_checkpoint", "chekpoint-9"],
            "takes last or the folder of a checkpoint, but got 'chekpoint-9'",
        ),
        (["--backbone_kwargs", '{"in_chans": 1}'], "read as RGB, but the backbone takes 1 channels."),
        (["--preset", "quick"], "Unknown preset 'quick'. Available: smoke."),
        (["--auto_augment", "trivial"], "--auto_augment takes autoaugment or randaugment, but got 'trivial'."),
    ],
)
def test_bad_options(tmp_path, monkeypatch, arguments, words):
    import train_cifar

    options = [*FAST, "--dataset", "digits", "--output_dir", tmp_path / "run", *arguments]
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", *map(str, options)])
    with pytest.raises(ValueError) as error:
        train_cifar.main()
    assert words in str(error.value)


def test_erased_pixels_are_grey():
    config = {"interpolation": "bilinear", "mean": [0.2, 0.4, 0.6]}
    options = data.DataArguments(crop_padding=0, horizontal_flip=False)
    plain = data.training_transform(options, config)(noise())
    assert plain.dtype == torch.uint8
    options.random_erasing = 1.0
    erased = data.training_transform(options, config)(noise())
    changed = (erased != plain).any(dim=0)
    assert changed.any() and (erased[:, changed] == torch.tensor([51, 102, 153]).unsqueeze(1)).all()


def test_controls(tmp_path, monkeypatch):
    """Augmentation, mixing and label smoothing together with a method, exits on a frozen backbone."""
    import train_cifar

    def train(name, *arguments):
        options = ["--dataset", "digits", "--preset", "smoke", "--max_train_samples", 64, "--max_eval_samples", 20]
        options += [*FAST, "--num_train_epochs", 1, "--output_dir", tmp_path / name, *arguments]
        monkeypatch.setattr(sys, "argv", ["train_cifar.py", *map(str, options)])
        train_cifar.main()

    mixing = ["--mixup", 0.2, "--cutmix", 1.0, "--label_smoothing_factor", 0.1]
    train("mixed", *mixing, "--auto_augment", "autoaugment", "--random_erasing", 0.5, "--method", "byot")
    train("random", "--auto_augment", "randaugment", "--method", "none", "--bf16", "true", "--ema_decay", 0.9)
    train("frozen", "--freeze_backbone", "true", "--method", "deep_supervision")
    torch.manual_seed(42)  # TrainingArguments' seed: the backbone is as it was drawn
    fresh = hf_selfkd.MultiExitForImageClassification.from_backbone(
        "test_resnet", num_labels=10, small_input_stem=True
    )
    frozen = hf_selfkd.MultiExitForImageClassification.from_pretrained(tmp_path / "frozen")
    for name, tensor in fresh.backbone.state_dict().items():
        assert torch.equal(tensor, frozen.backbone.state_dict()[name]), name
    assert not torch.equal(fresh.exits[0].classifier.weight, frozen.exits[0].classifier.weight)
