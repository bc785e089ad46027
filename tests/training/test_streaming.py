"""Streams: shared by processes and workers, resumed in mid-epoch."""

import random
import zlib
from dataclasses import fields

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments

from hf_selfkd import SelfDistillationTrainer
from hf_selfkd.training.streaming import SeededStream, StreamLoader, StreamPosition
from tests.helpers.data_parallel import network
from tests.helpers.processes import run_in_processes
from tests.helpers.recipe import PLAIN_SGD
from tests.helpers.runs import check_of


def draw(row):
    noise = random.random() + np.random.rand() + torch.rand(())
    image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(row["id"]))
    return {"pixel_values": image + noise, "labels": row["id"] % 5, "id": row["id"]}


def key(row):
    return str(row["id"]).encode()


def stream(rows=36, shards=9, num_rows=None, draw=draw):
    data = Dataset.from_dict({"id": list(range(rows))}).to_iterable_dataset(num_shards=shards)
    return SeededStream(data, draw, key, num_rows=num_rows, buffer_size=8)


def only_id(row):
    return {"id": row["id"], "noise": torch.rand(())}


def passes(rank, processes, rows, shards, workers, batch_size, multiple=1):
    """Return the rows and their noise that a process gets in each of two epochs, batch by batch."""
    part = stream(rows, shards, draw=only_id).prepared(0, check_of(5, "training"), share=(rank, processes, batch_size))
    loader = StreamLoader(DataLoader(part, batch_size=batch_size, num_workers=workers), multiple)
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found.append([dict(zip(batch["id"].tolist(), batch["noise"].tolist(), strict=True)) for batch in loader])
    return found


# Rows, shards, workers, size of batches: shards divide evenly; they do not; fewer shards than processes; more workers
# than shards; batches do not divide the shares.
SHARES = [(48, 12, 2, 4), (45, 5, 2, 3), (20, 1, 0, 5), (24, 3, 2, 4), (37, 6, 0, 4)]


def count(rank, processes, folder):
    torch.distributed.init_process_group("gloo")
    torch.save([passes(rank, processes, *share) for share in SHARES], folder / f"{processes}-{rank}.pt")


@pytest.mark.parametrize(
    "processes", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_every_row_comes_once(tmp_path, processes):
    if processes == 1:
        found = [[passes(0, 1, *share) for share in SHARES]]
    else:
        run_in_processes(count, processes, processes, tmp_path)
        found = [torch.load(tmp_path / f"{processes}-{rank}.pt") for rank in range(processes)]
    for share, epochs in zip(SHARES, zip(*found, strict=True), strict=True):
        rows, _, _, batch_size = share
        for epoch in range(2):
            batches = [process[epoch] for process in epochs]
            assert len({len(process) for process in batches}) == 1  # all processes take as many steps
            assert all(len(batch) <= batch_size for process in batches for batch in process)
            seen = [set().union(*process) for process in batches]
            assert sum(map(len, seen)) == rows  # no row on two processes
            assert set().union(*seen) == set(range(rows))  # and none lost
        first, second = ([list(batch) for batch in process] for process in epochs[0])
        assert first != second
    even = [sum(len(batch) for batch in process[0][0]) for process in found]
    assert even == [48 // processes] * processes  # no row twice where shares are even


def noise(processes, workers):
    batches = [batch for rank in range(processes) for batch in unsynchronised(rank, processes, workers)]
    return dict(pair for batch in batches for pair in zip(batch["id"].tolist(), batch["noise"].tolist(), strict=True))


def unsynchronised(rank, processes, workers):
    part = stream(draw=only_id).prepared(0, check_of(5, "training"), share=(rank, processes, 4))
    return DataLoader(part, batch_size=4, num_workers=workers)


def test_what_is_drawn_depends_on_neither_workers_nor_processes():
    alone = noise(1, 0)
    assert len(set(alone.values())) == 36
    assert noise(1, 2) == alone
    assert noise(3, 0) == alone


def train(folder, resume=None, data=None, **args):
    args = {
        **PLAIN_SGD,
        "max_steps": 14,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "remove_unused_columns": False,
    } | args
    model = network("test_vit")
    data = data or {"train_dataset": stream(33)}
    trainer = SelfDistillationTrainer(model, TrainingArguments(str(folder), **args), "byot", **data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("workers", "steps"), [(0, (6, 9)), pytest.param(2, (3, 9), marks=pytest.mark.slow)])
@pytest.mark.slow
def test_resuming_in_mid_epoch_equals_not_stopping(tmp_path, workers, steps):
    """Of 33 rows in batches of 3, two a step, an epoch has six steps, however its last batches are filled up."""
    uninterrupted = train(tmp_path / "a", dataloader_num_workers=workers, save_strategy="steps", save_steps=3)
    assert [int(entry["epoch"]) for entry in logs(uninterrupted)] == [0] * 5 + [1] * 6 + [2] * 3
    for step in steps:
        checkpoint = str(tmp_path / "a" / f"checkpoint-{step}")
        resumed = train(tmp_path / "b", dataloader_num_workers=workers, resume=checkpoint)
        assert logs(resumed) == logs(uninterrupted)
        state = resumed.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in uninterrupted.model.state_dict().items())


def test_a_stream_of_known_length_is_measured_in_epochs(tmp_path):
    data = {"train_dataset": stream(36, num_rows=36), "lr_milestones": [1], "lr_gamma": 0.5}
    trainer = train(tmp_path, data=data, max_steps=-1, num_train_epochs=2)
    assert trainer.state.global_step == 12
    assert [entry["learning_rate"] for entry in logs(trainer)] == [0.02] * 6 + [0.01] * 6
    assert [entry["epoch"] for entry in logs(trainer)] == pytest.approx([step / 6 for step in range(1, 13)])


def test_a_stream_of_unknown_length_needs_max_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        train(tmp_path, max_steps=-1)
    with pytest.raises(ValueError, match="lr_milestones are in epochs, but the training data has no length"):
        train(tmp_path, data={"train_dataset": stream(), "lr_milestones": [1]})


def test_a_checkpoint_of_other_data(tmp_path):
    rows = [draw({"id": index}) for index in range(12)]
    rows = [{"pixel_values": row["pixel_values"], "labels": row["labels"]} for row in rows]
    train(tmp_path, data={"train_dataset": rows}, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="The checkpoint was not trained on a stream. Resume with the data"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-1"))


def test_a_position_is_needed_to_resume():
    position = StreamPosition()
    with pytest.raises(ValueError, match="was not trained on a stream"):
        position.resume(TrainerState(), skips_data=True)
    position.loader = StreamLoader(DataLoader(stream()), 1)
    state = TrainerState(stateful_callbacks={"StreamPosition": {"args": {}, "attributes": {"position": [2, 5]}}})
    assert (position.resume(state, skips_data=True), position.loader.skip) == (2, 5)
    assert (position.resume(state, skips_data=False), position.loader.skip) == (2, 0)


def test_every_argument_of_loaders_has_its_effect_on_streams(tmp_path):
    """``dataloader_drop_last`` has nothing to drop: batches of a stream are filled up."""
    settings = {"num_workers": 1, "pin_memory": False, "persistent_workers": True, "prefetch_factor": 3}
    settings |= {"in_order": False, "multiprocessing_context": "spawn"}
    known = {field.name for field in fields(TrainingArguments) if field.name.startswith("dataloader_")}
    assert known <= {f"dataloader_{name}" for name in (*settings, "drop_last")}
    settings = {name: value for name, value in settings.items() if f"dataloader_{name}" in known}
    options = {f"dataloader_{name}": value for name, value in settings.items()}
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, **options)
    loader = SelfDistillationTrainer(network("test_vit"), args, train_dataset=stream()).get_train_dataloader().loader
    found = {name: getattr(loader, name) for name in settings}
    if "multiprocessing_context" in settings:  # in_order and this are arguments from transformers 5.15
        found["multiprocessing_context"] = loader.multiprocessing_context.get_start_method()
    assert found == settings


def test_streams_are_evaluated(tmp_path):
    evaluation = stream(10, 2)
    trainer = train(tmp_path, data={"train_dataset": stream(), "eval_dataset": evaluation}, max_steps=1)
    metrics = trainer.evaluate()
    listed = trainer.evaluate(list(evaluation.prepared(trainer.args.seed, check_of(5, "evaluation"))))
    assert metrics["eval_exit_0_accuracy"] == listed["eval_exit_0_accuracy"]
    assert metrics["eval_loss"] == pytest.approx(listed["eval_loss"])


def test_a_process_without_rows(tmp_path):
    rows = IterableDataset.from_generator(lambda files: iter([]), gen_kwargs={"files": ["a", "b"]})
    with pytest.raises(ValueError, match="A process received no row of the stream. Use fewer processes"):
        train(tmp_path, data={"train_dataset": SeededStream(rows, draw, key)})


def test_a_label_outside_the_classes_is_named(tmp_path):
    def wrong(row):
        return draw(row) | {"labels": row["id"] if row["id"] == 7 else 0}

    name = zlib.crc32(b"7")
    with pytest.raises(
        ValueError, match=f"Sample {name} of the training data has label 7, but the model has 5 classes"
    ):
        train(tmp_path, data={"train_dataset": stream(draw=wrong)})
