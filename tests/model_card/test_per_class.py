"""Files with the results per class, next to the card."""

import csv
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_selfkd.model_card import per_class, update_model_card
from hf_selfkd.tasks import TASKS
from tests.helpers.cards import sections_of


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def links(folder):
    results = sections_of((folder / "README.md").read_text())["Results"]
    return [path.name for path in folder.iterdir() if f"({path.name})" in results and "anytime" not in path.name]


def test_results_per_class_lie_next_to_the_card(build, images, train, tmp_path):
    images = [*images, images[0] | {"labels": -100}]
    names = {index: f"class {index}" for index in range(5)}
    card = {"trainer_kwargs": {"card": {"per_class": True}, "eval_dataset": images}}
    trainer = train(build(id2label=names), max_steps=1, per_device_eval_batch_size=8, **card)
    metrics = trainer.evaluate()
    trainer.save_model()
    folder = tmp_path / "run"
    assert sorted(links(folder)) == ["confusion_matrix.csv", "confusion_matrix.png", "per_class.csv"]
    header, *rows = read(folder / "confusion_matrix.csv")
    matrix = np.array([[int(cell) for cell in row[1:]] for row in rows])
    assert header[1:] == list(names.values()) and matrix.sum(axis=1).tolist() == [4] * 5
    assert np.trace(matrix) / 20 == pytest.approx(metrics["eval_accuracy"])
    header, *rows = read(folder / "per_class.csv")
    for column, name in zip(header[2:], ["exit_0", "exit_1", "exit_2", "exit_3", "ensemble"], strict=True):
        assert column == f"accuracy ({name.replace('_', ' ')})"
        mean = np.mean([float(row[header.index(column)]) for row in rows])
        assert mean == pytest.approx(metrics[f"eval_{name}_accuracy"], abs=1e-4)
    assert Image.open(folder / "confusion_matrix.png").size[0] > 300
    update_model_card(trainer.model, folder)  # from the stored facts
    assert len(links(folder)) == 3


def test_segmentation_and_several_datasets(build_segmenter, train, tmp_path):
    maps = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(3, (32, 32))} for _ in range(4)]
    card = {"eval_dataset": {"a/b": maps[:2], "c": maps[2:]}, "card": {"per_class": True}}
    trainer = train(build_segmenter(num_labels=3), "none", max_steps=1, trainer_kwargs={"train_dataset": maps} | card)
    metrics = trainer.evaluate()
    trainer.create_model_card()
    folder = tmp_path / "run"
    assert len(links(folder)) == 6
    header, *rows = read(folder / "per_class_a_b.csv")
    assert header[:3] == ["class", "pixels", "IoU (exit 0)"] and sum(int(row[1]) for row in rows) == 2 * 32 * 32
    ious = [float(row[-1]) for row in rows if row[-1]]
    assert np.mean(ious) == pytest.approx(metrics["eval_a/b_ensemble_mean_iou"], abs=1e-4)


def test_without_matplotlib_there_are_the_files_only(build, train, tmp_path, monkeypatch):
    trainer = train(build(), max_steps=1, trainer_kwargs={"card": {"per_class": True}})
    trainer.evaluate()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(per_class, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    trainer.create_model_card()
    assert sorted(links(tmp_path / "run")) == ["confusion_matrix.csv", "per_class.csv"]


def test_what_was_not_counted_is_missed_with_a_warning(build, train, tmp_path):
    trainer = train(build(), max_steps=1)
    trainer.evaluate()
    with pytest.warns(UserWarning, match="The results per class of the evaluation 'eval' are unknown"):
        trainer.create_model_card(per_class=True)
    assert links(tmp_path / "run") == []


def test_a_task_without_single_classes_refuses_before_training(build, train, monkeypatch):
    name = "image-classification"
    monkeypatch.setitem(TASKS, name, replace(TASKS[name], class_counts=None))
    with pytest.raises(ValueError, match="card has per_class=True, but image-classification has no single class"):
        train(build(), max_steps=1, trainer_kwargs={"card": {"per_class": True}})
