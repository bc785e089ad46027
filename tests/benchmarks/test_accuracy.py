import argparse
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def accuracy(monkeypatch):
    """Import the benchmark, with random images for its data and one epoch of a tiny network for its protocols."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("accuracy")
    tiny = replace(
        module.PROTOCOLS["cifar10-5k-100"],
        train_images=24,
        epochs=1,
        batch_size=4,
        seeds=(0,),
        eval_epochs=1,
        network={"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]},
    )
    monkeypatch.setitem(module.PROTOCOLS, "cifar10-5k-100", tiny)
    monkeypatch.setattr(module, "load", random_splits)
    monkeypatch.setattr(module, "summarise", lambda folder, *_: f"table of {folder}")  # has its own tests
    return module


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("accuracy_report")


def random_splits(dataset: str, train_images: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(10, (size,), generator=generator),
        )
        for name, size in (("train", train_images), ("test", 20))
    }


def start(module, folder: Path, configurations: list[str], *options: str) -> dict[str, dict]:
    """Run the command line and return the runs' facts by the names of their files, time aside."""
    folders = ["--work_dir", str(folder / "work"), "--results", str(folder)]
    module.main(["--dataset", "random", *folders, "--configurations", *configurations, *options])
    found = {path.name: json.loads(path.read_text()) for path in (folder / "cifar10-5k-100").glob("*.json")}
    for facts in found.values():
        del facts["minutes"]
    return found


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not_and_is_not_repeated(accuracy, tmp_path, capsys, monkeypatch):
    [name, file] = ["okd_mde+cutmix", "okd_mde+cutmix-seed0.json"]
    unbroken = start(accuracy, tmp_path / "unbroken", [name])
    assert unbroken.keys() == {file}
    assert start(accuracy, tmp_path / "broken", [name], "--time_limit", "0s") == {}
    [checkpoint] = (tmp_path / "broken/work/cifar10-5k-100/okd_mde+cutmix-seed0").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.removeprefix("checkpoint-")) < 6
    assert "Time is up in okd_mde+cutmix seed 0." in capsys.readouterr().out
    assert start(accuracy, tmp_path / "broken", [name]) == unbroken
    assert list((tmp_path / "broken/work/cifar10-5k-100").iterdir()) == []
    assert unbroken[file]["method"]["ramp_epochs"] == pytest.approx(80 / 300)
    assert unbroken[file]["accuracy"].keys() == {"exit_0", "exit_1", "exit_2", "exit_3", "ensemble"}
    assert [entry["epoch"] for entry in unbroken[file]["history"]] == [1.0]
    monkeypatch.setattr(accuracy, "train", None)
    monkeypatch.setattr(accuracy, "load", None)
    assert start(accuracy, tmp_path / "broken", [name, "no_such_method"]) == unbroken
    assert "no such method: no_such_method." in capsys.readouterr().out


def test_a_configuration_is_a_method_a_control_or_both(accuracy):
    method, label_smoothing, mix = accuracy.configure("label_smoothing", epochs=30)
    assert (method.name, label_smoothing, mix) == ("none", 0.1, None)
    method, label_smoothing, mix = accuracy.configure("byot+cutmix", epochs=30)
    assert (method.name, label_smoothing, type(mix).__name__) == ("byot", 0.0, "CutMix")
    method, label_smoothing, mix = accuracy.configure("okd_mde", epochs=30)
    assert (method.ramp_epochs, label_smoothing, mix) == (8.0, 0.0, None)
    assert accuracy.configure("ps_kd", epochs=30)[0].ramp_epochs == 30
    assert type(accuracy.configure("mixup", epochs=30)[2]).__name__ == "MixUp"


@pytest.mark.parametrize("text, expected", [("90s", 90.0), ("9m", 540.0), ("1.5h", 5400.0)])
def test_durations_have_units(accuracy, text, expected):
    assert accuracy.seconds(text) == expected


def test_a_duration_without_unit_is_refused(accuracy):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 90s, 9m or 1.5h, but got '9'"):
        accuracy.seconds("9")


def test_crops_hold_the_image_shifted_by_at_most_the_padding_and_half_are_mirrored(accuracy):
    image = torch.arange(1, 33, dtype=torch.uint8).expand(1, 3, 32, 32)  # each column its number
    images = accuracy.Images(image, torch.tensor([7]), augments=True)
    crops = torch.stack([images[0]["pixel_values"][0].amax(dim=0) for _ in range(400)]).int()
    shifts = {}
    for crop in crops:
        inside = crop[crop > 0]
        assert set((inside[1:] - inside[:-1]).tolist()) in ({1}, {-1})
        shifts.setdefault(int(inside[1] - inside[0]), set()).add(int(crop[16]))
    assert shifts == {1: set(range(13, 22)), -1: set(range(12, 21))}
    assert 150 < sum(int(crop[16] < crop[15]) for crop in crops) < 250
    plain = accuracy.Images(image, torch.tensor([7]), augments=False)[0]
    assert plain["labels"] == 7 and torch.equal(plain["pixel_values"], image[0])


def runs_of(**accuracies: list[float]) -> dict[str, list[dict]]:
    """Make runs of two exits, seeds from 0, by the final exit's accuracies."""
    return {
        name: [
            {
                "configuration": name,
                "seed": seed,
                "accuracy": {"exit_0": 0.5, "exit_1": value, "ensemble": value},
                "best": {"accuracy": {"exit_0": 0.5, "exit_1": value + 0.01}},
                "minutes": {"cpu": 20.0 if name == "none" else 25.0, "wall": 1.0},
                "on_cpu": True,
                "protocol": {"eval_epochs": 5},
                "exits": {"stages": [1], "heads": ["ConvExit"], "multiply_adds": [1_000_000, 2_500_000]},
            }
            for seed, value in enumerate(values)
        ]
        for name, values in accuracies.items()
    }


def test_the_paired_interval_is_that_of_the_t_distribution(report):
    runs = runs_of(none=[0.60, 0.62, 0.61], byot=[0.61, 0.64, 0.64, 0.99])
    # differences 1, 2, 3 of three shared seeds: mean 2, standard deviation 1, t(0.975; 2) = 4.302653
    mean, half_width = report.difference(runs["byot"], runs["none"], "exit_1")
    assert mean == pytest.approx(2.0)
    assert half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    two, half_width = report.difference(runs["byot"][:2], runs["none"], "exit_1")
    assert two == pytest.approx(1.5)
    assert half_width == pytest.approx(12.706205 * 0.5, rel=1e-6)
    assert report.difference(runs["byot"][2:3], runs["none"], "exit_1") == (pytest.approx(3.0), None)
    assert report.difference(runs["byot"][3:], runs["none"], "exit_1") is None


def test_the_table_gives_means_errors_intervals_and_time(report):
    runs = runs_of(none=[0.60, 0.62, 0.61], byot=[0.61, 0.64, 0.64])
    assert report.row("byot", runs) == {
        "configuration": "byot",
        "seeds": "3",
        "exit 0": "50.00 ± 0.00",
        "exit 1": "63.00 ± 1.00",
        "ensemble": "63.00 ± 1.00",
        "exit 1 over none": "+2.00 [-0.48, +4.48]",
        "best epoch": "64.00 ± 1.00",
        "training time": "x 1.25",
    }
    assert report.row("none", runs)["exit 1 over none"] == ""
    complete = report.caption(runs, 3, "Protocol.")
    assert "at 1.0, 2.5 million multiply-adds" in complete
    assert "Incomplete" not in complete and "One seed" not in complete
    partial = report.caption(runs_of(none=[0.6, 0.6, 0.6], eed=[0.6]), 3, "Protocol.")
    assert "of 3 seeds there are eed 1." in partial and "One seed gives no interval" in partial


def test_table_and_plot_list_the_baseline_first_and_strangers_last(report, tmp_path):
    assert report.summarise(tmp_path, {"eval_epochs": 5}, 1, "Protocol.", []).startswith("No run is complete yet")
    for run in sum(runs_of(**{"byot+cutmix": [0.6], "eed": [0.6], "none": [0.6, 0.7]}).values(), []):
        (tmp_path / f"{run['configuration']}-seed{run['seed']}.json").write_text(json.dumps(run))
    table = report.summarise(tmp_path, {"eval_epochs": 5}, 1, "Protocol.", ["none", "eed"])
    assert [line.split(" ")[1] for line in table.splitlines()[2:5]] == ["none", "eed", "byot+cutmix"]
    assert (tmp_path / "table.md").read_text() == table + "\n"
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key, value", [("protocol", {"eval_epochs": 1}), ("exits", {"stages": [2]})])
def test_runs_of_another_kind_are_refused(report, tmp_path, key, value):
    [first, second] = runs_of(none=[0.6, 0.6])["none"]
    for name, run in (("a-seed0.json", first), ("b-seed1.json", second | {key: value})):
        (tmp_path / name).write_text(json.dumps(run))
    with pytest.raises(ValueError, match=f"b-seed1.json differs from the others in {key}"):
        report.read_runs(tmp_path, {"eval_epochs": 5}, ["none"])
