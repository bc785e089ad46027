"""The ImageNet example on a stand-in of the same layout, and the files for accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import data
import numpy as np
import pytest
import train_imagenet
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageClassification

from tests.helpers.processes import free_port

EXAMPLES = Path(train_imagenet.__file__).parent
ACCELERATE = EXAMPLES / "accelerate"
SMALL = ["--backbone", "test_resnet", "--image_size", "32", "--use_cpu", "true", "--disable_tqdm", "true"]
SMALL += ["--num_train_epochs", "2", "--per_device_train_batch_size", "6", "--lr_milestones", "1"]


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """Return a folder of three classes, each with eight JPEGs to train on and three to evaluate on."""
    folder = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for kind in range(3):
            (folder / split / f"n0144{kind}").mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(80 * kind, 80 * kind + 90, (40, 56, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"n0144{kind}" / f"{index}.JPEG")
    return folder


@pytest.fixture(scope="module")
def parquet(standin, tmp_path_factory):
    """Return the same as parquet files, as the Hub stores it."""
    folder = tmp_path_factory.mktemp("parquet")
    for name, split in load_dataset(str(standin)).items():
        for index in range(4):
            split.shard(4, index).to_parquet(folder / f"{name}-{index:05}-of-00004.parquet")
    return folder


def run(*options):
    train_imagenet.main([str(option) for option in options])


def test_a_folder_trains(standin, tmp_path):
    run("--dataset", standin, *SMALL, "--output_dir", tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert sorted(model.config.id2label.values()) == ["n01440", "n01441", "n01442"]
    settings = model.config.pretrained_cfg
    assert (settings["input_size"], settings["crop_pct"]) == ([3, 32, 32], 0.875)
    assert settings["mean"] == [0.485, 0.456, 0.406]
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (8, 2)


@pytest.mark.slow
def test_a_stream_trains_and_resumes(parquet, tmp_path):
    options = ["--dataset", parquet, "--streaming", "true", "--num_train_images", "24", *SMALL]
    options += ["--logging_strategy", "steps", "--logging_steps", "1", "--save_total_limit", "5"]
    run(*options, "--output_dir", tmp_path / "complete", "--save_strategy", "steps", "--save_steps", "3")
    complete = json.loads((tmp_path / "complete" / "checkpoint-8" / "trainer_state.json").read_text())
    (tmp_path / "part").mkdir()
    os.rename(tmp_path / "complete" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    options += ["--output_dir", tmp_path / "part", "--resume_from_checkpoint", "last"]
    run(*options, "--save_strategy", "steps", "--save_steps", "3")
    part = json.loads((tmp_path / "part" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [entry for entry in part["log_history"] if "loss" in entry] == [
        entry for entry in complete["log_history"] if "loss" in entry
    ]


def test_the_recipe():
    options = train_imagenet.ImageNetModel()
    images = train_imagenet.ImageNetData()
    args = train_imagenet.ImageNetRecipe("unused", use_cpu=True)
    assert (args.num_train_epochs, args.learning_rate, args.weight_decay) == (100, 0.1, 1e-4)
    assert (args.per_device_train_batch_size, options.lr_milestones) == (256, [30, 60, 90])
    names = {"interpolation": "bicubic", "mean": images.mean, "std": images.std}
    transform = data.training_transform(images, names)
    picture = Image.fromarray(np.zeros((300, 500, 3), dtype=np.uint8))
    assert transform(picture).shape == (3, 224, 224)
    assert "RandomResizedCrop(size=(224, 224), scale=(0.08, 1.0)" in str(transform)


def test_streams_without_what_they_need(standin, parquet):
    images = data.DataArguments(dataset=str(parquet), streaming=True, max_train_samples=4)
    with pytest.raises(ValueError, match="--max_train_samples does not apply to streams, which are not read before"):
        data.load_images(images)
    images = data.DataArguments(dataset=str(standin), evaluation_split="dev")
    with pytest.raises(ValueError, match="has the splits train, validation, but none to evaluate on: one of dev"):
        data.load_images(images)


def test_a_stream_of_unknown_length_needs_max_steps(parquet, tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        run("--dataset", parquet, "--streaming", "true", *SMALL, "--output_dir", tmp_path)


# The files for accelerate


def launch(file, *options):
    """Parse a command line as accelerate does, up to starting the processes."""
    words = ["--config_file", str(ACCELERATE / file), *options, "train_imagenet.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.mark.parametrize("path", sorted(ACCELERATE.iterdir()), ids=lambda path: path.stem)
def test_accelerate_reads_every_file(path):
    assert load_config_from_file(str(path)).to_dict()["compute_environment"] == "LOCAL_MACHINE"
    assert f"--config_file examples/accelerate/{path.name}" in path.read_text().split("compute_environment")[0]


def test_accelerate_parses_every_file_as_meant():
    one = launch("one_machine.yaml", "--num_processes", "2")
    assert (one.multi_gpu, one.use_fsdp, one.num_machines, one.num_processes) == (True, False, 1, 2)
    several = launch("several_machines.yaml", "--machine_rank", "1", "--main_process_ip", "127.0.0.1")
    assert (several.num_machines, several.num_processes, several.machine_rank) == (2, 16, 1)
    assert (several.main_process_ip, several.main_process_port) == ("127.0.0.1", 29500)
    sharded = prepare_multi_gpu_env(launch("fsdp2.yaml"))
    assert sharded["ACCELERATE_USE_FSDP"] == "true"
    assert sharded["FSDP_VERSION"] == "2"
    assert sharded["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert sharded["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert sharded["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "Block"


def start(standin, folder, *options):
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(EXAMPLES / "train_imagenet.py")]
    command += ["--dataset", str(standin), *SMALL, "--per_device_train_batch_size", "3", "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_are_launched(standin, parquet, tmp_path, machines):
    if machines == 1:
        options = ["--config_file", str(ACCELERATE / "one_machine.yaml"), "--num_processes", "2"]
        processes = [start(standin, tmp_path, *options)]
    else:
        options = ["--config_file", str(ACCELERATE / "several_machines.yaml"), "--num_processes", "2"]
        options += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--machine_rank"]
        processes = [start(standin, tmp_path, *options, str(rank)) for rank in range(2)]
    printed = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), printed[0][-3000:]
    assert "Saved to" in printed[0] and "".join(printed).count("Saved to") == 1
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (8, 2)  # 24 images by two processes of 3
    assert AutoModelForImageClassification.from_pretrained(tmp_path).num_exits == 4
