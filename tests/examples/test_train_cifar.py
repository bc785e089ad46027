"""The classification example: once as a user runs it, else in this process."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import data
import numpy as np
import pytest
import timm
import torch
import train_cifar
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDatasetDict
from huggingface_hub import ModelCard
from PIL import ExifTags
from PIL import Image as PILImage
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, pipeline
from transformers.image_utils import load_image

import hf_selfkd
from tests.helpers.hub_server import HubServer
from tests.helpers.runs import same_weights

FAST = ["--backbone", "test_resnet", "--backbone_kwargs", "{}", "--use_cpu", "true"]
DIGITS = ["--dataset", "digits", "--preset", "smoke", "--num_train_epochs", "2", "--max_train_samples", "320"]
DIGITS += ["--image_size", "8", "--learning_rate", "0.02", "--max_eval_samples", "120"]


def run(*arguments):
    train_cifar.main([str(argument) for argument in arguments])


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
    """Train on scikit-learn's digits like `make train`, but for fewer epochs of a smaller model, and push it."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, train_cifar.__file__, *DIGITS, *FAST]
    command += ["--push_to_hub", "true", "--hub_private_repo", "true", "--hub_token", "hf_of_ada"]
    with HubServer() as server:
        environment = server.environment(tmp_path_factory.mktemp("home"), token=None)
        command += ["--output_dir", str(folder)]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, process, server.repositories["ada/digits"]


def test_training_shows_one_bar_and_a_row_per_epoch(digits_run):
    _, process, _ = digits_run
    lines = process.stdout.splitlines()
    header, *rows = lines[lines.index(next(line for line in lines if line.lstrip().startswith("epoch"))) :][:3]
    assert header.split() == "epoch loss exit 0 exit 1 exit 2 exit 3 ensemble".split()
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert {len(row.split()) for row in rows} == {7}
    assert "{" not in process.stdout and "Warning" not in process.stderr
    assert {line.split("/")[1].split()[0] for line in re.findall(r"\d+/\d+ \[", process.stderr)} == {"20"}  # steps


def test_training_ends_with_a_table_and_a_checkpoint_for_pipeline(digits_run):
    folder, process, _ = digits_run
    metrics = json.loads((folder / "eval_results.json").read_text())
    before, after = process.stdout.split("   epoch", maxsplit=1)
    assert "320 images to train on, 120 images to evaluate on, 10 classes" in before
    assert "8x8 pixels, RGB" in before and "learning rate 0.02, times 0.1 after epochs 5 (5 not reached" in before
    lines = [line for line in after.splitlines() if line.startswith("|")]
    header, _, *rows, ensemble = [line.strip("| ").split(" | ") for line in lines]
    assert ensemble[:2] == ["ensemble", f"{100 * metrics['eval_ensemble_accuracy']:.2f}"]
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
        assert float(row[1]) == pytest.approx(100 * metrics[f"eval_exit_{exit}_accuracy"], abs=0.01)
        assert float(row[3]) == pytest.approx(cost / 1e6, abs=0.01)
    assert float(rows[-1][4]) == pytest.approx(model.num_parameters() / 1e6, abs=0.001)
    card = ModelCard.load(folder / "README.md")
    assert "120 images of scikit-learn digits" in card.text and "| crop_padding | 4 |" in card.text
    found = [result.metric_value for result in card.data.eval_results]
    assert found[:-1] == pytest.approx([metrics[f"eval_exit_{exit}_accuracy"] for exit in range(4)], abs=5e-5)
    predictions = pipeline("image-classification", model=str(folder))(noise())
    assert {entry["label"] for entry in predictions} <= {str(digit) for digit in range(10)}


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
    images, _ = data.load_images(data.DataArguments(dataset="digits", max_eval_samples=120))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.config.pretrained_cfg))
    samples = [data.LabelledImages(images["test"], transform)[index] for index in range(120)]
    with torch.no_grad():
        output = model(torch.stack([sample["pixel_values"] for sample in samples]))
    labels = torch.tensor([sample["labels"] for sample in samples])
    metrics = json.loads((folder / "eval_results.json").read_text())
    for exit, logits in enumerate(output.exit_logits):
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        assert accuracy == pytest.approx(metrics[f"eval_exit_{exit}_accuracy"], abs=0.003)


def test_a_run_is_never_overwritten_but_resumed(digits_run):
    folder, _, _ = digits_run
    with pytest.raises(ValueError, match="already holds a run. Resume it with --resume_from_checkpoint last"):
        run(*DIGITS, *FAST, "--output_dir", folder)
    before = (folder / "model.safetensors").read_bytes()
    metrics = json.loads((folder / "eval_results.json").read_text())
    run(*DIGITS, *FAST, "--output_dir", folder, "--resume_from_checkpoint", "last")
    assert (folder / "model.safetensors").read_bytes() == before  # the run was over: nothing is left to train
    again = json.loads((folder / "eval_results.json").read_text())
    names = [name for name in metrics if "accuracy" in name]
    assert [again[name] for name in names] == [metrics[name] for name in names]
    assert "| crop_padding | 4 |" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_the_final_weights_are_evaluated_once(tmp_path, monkeypatch):
    count, evaluate = [], hf_selfkd.SelfDistillationTrainer.evaluate
    monkeypatch.setattr(
        hf_selfkd.SelfDistillationTrainer, "evaluate", lambda self, *a, **k: count.append(1) or evaluate(self, *a, **k)
    )
    options = ["--max_train_samples", "32", "--max_eval_samples", "20", "--image_size", "8", "--num_train_epochs", "1"]
    run(*DIGITS, *FAST, *options, "--output_dir", tmp_path / "each")
    assert len(count) == 1
    run(*DIGITS, *FAST, *options, "--output_dir", tmp_path / "none", "--eval_strategy", "no")
    assert len(count) == 2
    assert all((tmp_path / name / "eval_results.json").exists() for name in ("each", "none"))


def test_a_folder_of_images_of_every_mode(tmp_path):
    modes = {"RGB": "png", "L": "png", "RGBA": "png", "P": "png", "CMYK": "jpg", "1": "png", "LA": "png"}
    write_images(tmp_path / "images", {f"{mode}.{suffix}": noise(mode) for mode, suffix in modes.items()})
    images, names = data.load_images(data.DataArguments(dataset=str(tmp_path / "images")))
    assert names == ["class0", "class1"]
    assert len(images["train"]) == len(modes)
    for row in images["train"]:
        assert data.read_image(row["image"]).mode == "RGB"
    options = ["--per_device_train_batch_size", "4", "--num_train_epochs", "1", "--lr_milestones", "1"]
    options += ["--backbone_kwargs", '{"in_chans": 1}']  # and read as grey
    run("--dataset", tmp_path / "images", *FAST, *options, "--output_dir", tmp_path / "run")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.pretrained_cfg["input_size"] == [1, 32, 32]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    PILImage.fromarray(np.array([[0, 25700, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    image = data.read_image({"path": str(tmp_path / "deep.png"), "bytes": None})
    assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_datasets_and_pipelines_turn_them(tmp_path, orientation):
    path, exif = str(tmp_path / "turned.png"), PILImage.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    noise().crop((0, 0, 6, 4)).save(path, exif=exif)
    expected = [np.asarray(Image().decode_example({"path": path, "bytes": None})), np.asarray(load_image(path))]
    found = np.asarray(data.read_image({"path": path, "bytes": None}))
    assert found.shape[:2] == ((4, 6) if orientation < 5 else (6, 4))
    assert all(np.array_equal(found, image) for image in expected)


def test_cards_name_data_by_its_usual_name(tmp_path):
    on_the_hub = data.describe_data(data.DataArguments(dataset="cifar10", mixup=0.2))
    assert on_the_hub["dataset"] == "cifar10" and on_the_hub["dataset_tags"] == "uoft-cs/cifar10"
    assert on_the_hub["recipe"] == {"crop_padding": 4, "horizontal_flip": True, "mixup": 0.2}
    local = data.describe_data(data.DataArguments(dataset=str(tmp_path / "flowers"), horizontal_flip=False))
    assert local == {"dataset": "flowers", "recipe": {"crop_padding": 4}}


def test_an_unreadable_file_is_named_with_its_index(tmp_path):
    write_images(tmp_path / "images", {f"{index}.png": noise() for index in range(6)})
    (tmp_path / "images" / "train" / "class0" / "2.png").write_bytes(b"not an image")
    words = "^Sample 1 of the training data cannot be read: .*class0/2.png is not a readable image"
    with pytest.raises(ValueError, match=words):
        run("--dataset", tmp_path / "images", *FAST, "--output_dir", tmp_path / "run")


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


def test_labels_that_are_not_classes(tmp_path):
    folder = parquet(tmp_path / "text", {"image": [noise()] * 2, "label": ["cat", "dog"]})
    with pytest.raises(ValueError, match="Column 'label' must hold integers from 0 or class labels, but holds"):
        data.load_images(data.DataArguments(dataset=folder))
    folder = parquet(tmp_path / "numbers", {"image": [noise()] * 3, "label": [0, 3, 1]})
    assert data.load_images(data.DataArguments(dataset=folder))[1] == ["0", "1", "2", "3"]


def kinds_of(count):
    """Return rows class by class, as class folders are read."""
    rows = {"image": [{"bytes": b"", "path": None}] * (3 * count), "label": sorted([0, 1, 2] * count)}
    features = Features(image=Image(decode=False), label=ClassLabel(names=["a", "b", "c"]))
    return Dataset.from_dict(rows, features=features)


def test_a_part_of_class_folders_has_all_classes(monkeypatch):
    splits = DatasetDict(train=kinds_of(20), test=kinds_of(10))
    monkeypatch.setattr(data.loading, "_load", lambda name, streaming: splits)
    images, _ = data.load_images(data.DataArguments(dataset="x", max_train_samples=15, max_eval_samples=12))
    assert set(images["train"]["label"]) == set(images["test"]["label"]) == {0, 1, 2}
    assert (len(images["train"]), len(images["test"])) == (15, 12)
    mixed = kinds_of(20).select([index * 7 % 60 for index in range(60)])
    splits = DatasetDict(train=mixed, test=mixed)
    images, _ = data.load_images(data.DataArguments(dataset="x", max_train_samples=15))
    assert images["train"]["label"][:] == mixed["label"][:15]  # the first ones, as ever


def test_images_to_evaluate_on_are_held_out(monkeypatch):
    splits = DatasetDict(train=kinds_of(20))
    monkeypatch.setattr(data.loading, "_load", lambda name, streaming: splits)
    with pytest.raises(ValueError, match="or --eval_share 0.15 to hold out training images"):
        data.load_images(data.DataArguments(dataset="x"))
    images, _ = data.load_images(data.DataArguments(dataset="x", eval_share=0.15))
    assert sorted(images["test"]["label"]) == [0] * 3 + [1] * 3 + [2] * 3
    assert len(images["train"]) == 51
    with pytest.raises(ValueError, match="must lie between 0 and 1, but got 1.5"):
        data.load_images(data.DataArguments(dataset="x", eval_share=1.5))
    splits["val"] = kinds_of(1)
    with pytest.raises(ValueError, match="there is a split val: remove it"):
        data.load_images(data.DataArguments(dataset="x", eval_share=0.15))


@pytest.mark.parametrize(
    ("splits", "words"),
    [({"train": 1}, "none to evaluate on: one of test, validation"), ({"test": 1}, "but none called train")],
)
def test_missing_splits(monkeypatch, splits, words):
    features = Features(image=Image(), label=ClassLabel(names=["a"]))
    split = Dataset.from_dict({"image": [noise()], "label": [0]}, features=features)
    monkeypatch.setattr(data.loading, "_load", lambda name, streaming: DatasetDict({name: split for name in splits}))
    with pytest.raises(ValueError, match=words):
        data.load_images(data.DataArguments(dataset="x"))


@pytest.mark.parametrize("missing", [-1, None, "column"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_without_labels_is_not_evaluated_on(monkeypatch, missing, streaming):
    features = Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    rows = {"image": [noise()] * 2, "label": [0, 1]}
    labelled = Dataset.from_dict(rows, features=features)
    if missing == "column":
        unlabelled = labelled.remove_columns("label")
    else:
        unlabelled = Dataset.from_dict(rows | {"label": [missing] * 2}, features=features)
    splits = {"train": labelled, "validation": labelled, "test": unlabelled}
    kind = IterableDatasetDict if streaming else DatasetDict
    splits = {name: split.to_iterable_dataset() if streaming else split for name, split in splits.items()}
    monkeypatch.setattr(data.loading, "_load", lambda name, streaming: kind(splits))
    options = {"dataset": "x", "streaming": streaming}
    images, _ = data.load_images(data.DataArguments(**options))
    assert [row["label"] for row in images["test"]] == [0, 1]
    del splits["validation"]
    with pytest.raises(ValueError, match="none to evaluate on: one of validation, valid, val is needed"):
        data.load_images(data.DataArguments(**options))


def test_without_the_hub_the_alternatives_are_named():
    with pytest.raises(ValueError, match="uoft-cs/cifar100 could not be downloaded .* use --dataset digits, or --dat"):
        data.load_images(data.DataArguments())
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
        (["--backbone_kwargs", '{"in_chans": 4}'], "read as RGB or grey, but the backbone takes 4 channels."),
        (["--recipe", "photo"], "--recipe takes cifar, photos or auto, but got 'photo'."),
        (["--lr_scheduler_type", "cosine", "--lr_milestones", "3"], "Give one of them."),
        (
            ["--backbone", "deit_tiny_distilled_patch16_224", "--recipe", "photos", "--image_size", "64"],
            "does not take images of 64x64 pixels. Use --image_size 224, or build it for these with --backbone_kwargs",
        ),
        (["--preset", "quick"], "Unknown preset 'quick'. Available: smoke."),
        (["--auto_augment", "trivial"], "--auto_augment takes autoaugment or randaugment, but got 'trivial'."),
    ],
)
def test_bad_options(tmp_path, arguments, words):
    with pytest.raises(ValueError) as error:
        run(*FAST, "--dataset", "digits", "--output_dir", tmp_path / "run", *arguments)
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


@pytest.mark.slow
def test_regularization_and_a_frozen_backbone(tmp_path):
    """Augmentation, mixing and label smoothing together with a method, exits on a frozen backbone."""

    def train(name, *arguments):
        options = [*DIGITS, "--max_train_samples", 64, "--max_eval_samples", 20, "--num_train_epochs", 1]
        run(*options, *FAST, "--output_dir", tmp_path / name, *arguments)

    mixing = ["--mixup", 0.2, "--cutmix", 1.0, "--label_smoothing_factor", 0.1]
    train("mixed", *mixing, "--auto_augment", "autoaugment", "--random_erasing", 0.5, "--method", "byot")
    train("random", "--auto_augment", "randaugment", "--method", "none", "--bf16", "true", "--ema_decay", 0.9)
    train("frozen", "--freeze_backbone", "true", "--method", "deep_supervision")
    torch.manual_seed(42)  # TrainingArguments' seed: the backbone is as it was drawn
    fresh = hf_selfkd.MultiExitForImageClassification.from_backbone(
        "test_resnet", num_labels=10, small_input_stem=True
    )
    frozen = hf_selfkd.MultiExitForImageClassification.from_pretrained(tmp_path / "frozen")
    assert same_weights(fresh.backbone, frozen.backbone)
    assert not torch.equal(fresh.exits[0].classifier.weight, frozen.exits[0].classifier.weight)


@pytest.mark.parametrize("num_classes", [1000, 3])
def test_a_new_classifier_on_a_frozen_backbone_is_trained(tmp_path, num_classes):
    weights = str(tmp_path / "weights.safetensors")
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    overlay = json.dumps({"pretrained_cfg_overlay": {"file": weights}})
    options, images, _ = parse(
        *("--backbone", "test_resnet", "--pretrained", "true", "--freeze_backbone", "true"),
        *("--backbone_kwargs", overlay, "--recipe", "photos"),
    )
    model = train_cifar.build_model(options, images, [str(index) for index in range(num_classes)])
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert trained == (set() if num_classes == 1000 else {"fc.weight", "fc.bias"})


# Recipes


def parse(*options):
    return train_cifar.parse([*map(str, options), "--output_dir", "unused", "--use_cpu", "true"])


def test_small_images_keep_the_recipe_of_the_papers(tmp_path):
    write_images(tmp_path, {f"{index}.png": noise() for index in range(2)})
    for options in ((), ("--dataset", "digits"), ("--dataset", tmp_path), ("--recipe", "cifar")):
        model, images, args = parse(*options)
        assert (model.recipe, model.lr_milestones, model.small_input_stem) == ("cifar", [75, 130, 180], True)
        assert (images.image_size, images.crop_scale, images.crop_pct) == (32, None, 1.0)
        assert (args.learning_rate, args.optim, args.max_grad_norm, args.num_train_epochs) == (0.1, "sgd", 0.0, 200)


@pytest.mark.parametrize(
    ("options", "optim", "rate"),
    [
        (("--backbone", "resnet18"), "sgd", 0.02),
        (("--backbone", "resnet50.a1_in1k", "--pretrained", "true"), "sgd", 0.005),
        (("--backbone", "tf_efficientnet_lite0", "--pretrained", "true"), "adamw_torch", 5e-4),
        (("--backbone", "deit_tiny_patch16_224", "--pretrained", "true"), "adamw_torch", 1e-4),
        (("--backbone", "convnext_atto", "--learning_rate", "0.3"), "adamw_torch", 0.3),
    ],
)
def test_photographs_get_a_recipe_by_family(tmp_path, options, optim, rate):
    write_images(tmp_path, {f"{index}.png": noise().resize((90, 60)) for index in range(2)})
    model, images, args = parse("--dataset", tmp_path, *options)
    assert (model.recipe, model.lr_milestones, model.small_input_stem) == ("photos", [], False)
    assert (images.image_size, images.crop_scale, args.lr_scheduler_type) == (None, 0.35, "cosine")
    assert (args.optim, args.learning_rate, args.max_grad_norm) == (optim, rate, 1.0)
    assert args.per_device_eval_batch_size == 32


def test_a_network_for_photographs_keeps_the_size_and_statistics_of_its_backbone():
    options, images, _ = parse("--recipe", "photos", "--backbone", "test_convnext")
    settings = train_cifar.build_model(options, images, ["a", "b"]).config.pretrained_cfg
    plain = timm.create_model("test_convnext").pretrained_cfg
    for name in ("input_size", "mean", "std", "crop_pct"):
        assert settings[name] == (list(plain[name]) if isinstance(plain[name], tuple) else plain[name])
    picture = noise().resize((300, 200))
    assert data.training_transform(images, timm.data.resolve_data_config(settings))(picture).shape == (3, 160, 160)


def test_a_scheduler_takes_the_place_of_the_milestones():
    model, _, args = parse("--lr_scheduler_type", "cosine")
    assert (model.lr_milestones, args.lr_scheduler_type) == ([], "cosine")
    model, _, args = parse("--recipe", "photos", "--lr_milestones", 3, 5)
    assert model.lr_milestones == [3, 5]


PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
RECIPES = re.findall(r"^\| ([A-Z-]+) \| `(--.*?)`", PAGE, flags=re.MULTILINE)


def test_recipes_are_found():
    assert sorted(name for name, _ in RECIPES) == ["BYOT", "DKS", "FRSKD", "LSH", "OKD-MDE", "PS-KD"]


@pytest.mark.parametrize(("name", "options"), RECIPES)
def test_the_recipes_of_the_docs_are_options(name, options):
    model, _, args = train_cifar.parse([*shlex.split(options), "--output_dir", "unused", "--use_cpu", "true"])
    assert model.method == name.lower().replace("-", "_")
    assert max(model.lr_milestones) < args.num_train_epochs


PHOTOGRAPHS = (Path(__file__).parents[2] / "docs" / "photographs.md").read_text()
FAMILIES = re.findall(r"^\| [\w ,-]+ \| `(--backbone .*?)` \|", PHOTOGRAPHS, flags=re.MULTILINE)


def test_families_are_found():
    assert len(FAMILIES) >= 5


@pytest.mark.parametrize("options", FAMILIES)
def test_the_recipes_by_family_build_networks_for_their_size(options):
    model, images, _ = parse("--recipe", "photos", *shlex.split(options))
    train_cifar.check_image_size(model, images)
