"""Training on several processes against training on one with the same global batch."""

import copy
import random

import numpy as np
import pytest
import torch
from timm.layers import convert_sync_batchnorm
from transformers import TrainingArguments

from hf_selfkd import (
    SelfDistillationTrainer,
    get_method,
)
from hf_selfkd.tasks import task_of
from hf_selfkd.training.distributed import average_batch_norm, broadcast_buffers, on_any_process
from tests.helpers.data_parallel import CASES, GLOBAL_BATCH, network, samples, teacher
from tests.helpers.processes import replace_batch_norm, run_in_processes
from tests.helpers.recipe import PLAIN_SGD


def train(case, folder, *, processes, mix=None, ema_decay=None, batch_norm=False, resume=None, **args):
    name, hyper_parameters = CASES[case]
    if hyper_parameters.get("teacher") == "test_vit":
        hyper_parameters = hyper_parameters | {"teacher": teacher()}
    args = {
        **PLAIN_SGD,
        "max_steps": 4,
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.02,
        "optim_args": "momentum=0.9",
        "seed": 0,
    } | args
    if processes > 1:
        args["ddp_backend"] = "gloo"
    model = network(name)
    trainer = SelfDistillationTrainer(
        model,
        TrainingArguments(str(folder), **args),
        get_method(case.split()[0], **hyper_parameters),
        train_dataset=samples(name),
        eval_dataset=samples(name, 19),  # no multiple of any batch
        mix=mix,
        ema_decay=ema_decay,
        card={"per_class": task_of(model).class_counts is not None},
    )
    assert trainer.args.world_size == processes
    if not batch_norm:
        replace_batch_norm(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained_state(trainer):
    """Return copies of the weights and of the scaffold's."""
    state = trainer.model.state_dict()
    if trainer.scaffold is not None:
        state |= {f"scaffold.{name}": tensor for name, tensor in trainer.scaffold.state_dict().items()}
    return {name: tensor.clone() for name, tensor in state.items()}


def record(trainer):
    """Return all that must be equal on all processes."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate()
    confusion = trainer.card_recorder.evaluations["eval"].confusion
    return {
        "weights": trained_state(trainer),
        "confusion": torch.zeros(()) if confusion is None else torch.from_numpy(confusion),
        "logs": [{name: value for name, value in entry.items() if name.startswith("loss")} for entry in logs],
        "metrics": {
            name: value
            for name, value in metrics.items()
            if not name.endswith(("runtime", "per_second")) and name != "epoch"
        },
    }


def train_cases(rank, cases, processes, folder):
    found = {case: record(train(case, folder / "run", processes=processes)) for case in cases}
    torch.save(found, folder / f"rank{rank}.pt")


def check_cases(found, others, folder):
    """Compare training on several processes with training on one, and return the largest differences of weights."""
    differences = {}
    for case in found:
        for other in others:  # planes, medians, branches and teachers are among the weights
            weights = other[case]["weights"]
            assert found[case]["weights"].keys() == weights.keys()
            assert all(torch.equal(tensor, weights[name]) for name, tensor in found[case]["weights"].items())
            assert found[case]["metrics"] == pytest.approx(other[case]["metrics"])
            assert torch.equal(found[case]["confusion"], other[case]["confusion"])
        expected = record(train(case, folder / "alone", processes=1))
        assert len(expected["logs"]) == 4
        for logs, entry in zip(found[case]["logs"], expected["logs"], strict=True):
            assert logs == pytest.approx(entry, rel=1e-4, abs=1e-6), case
        assert found[case]["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6), case
        assert torch.equal(found[case]["confusion"].sum(dim=-1), expected["confusion"].sum(dim=-1)), case  # labels
        differences[case] = max(
            (tensor.double() - expected["weights"][name].double()).abs().max().item()
            for name, tensor in found[case]["weights"].items()
            if tensor.dtype != torch.float16  # predictions, whose last bit is 2e-4
        )
    return differences


class Draws:
    """A mix that records its draws and changes nothing."""

    def __init__(self):
        self.drawn = []

    def __call__(self, images, labels):
        self.drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return images, labels


def work(rank, folder):
    """Do on two processes all that the quick tests look at."""
    train_cases(rank, ["eed+lsh", "lsh with a teacher", "ps_kd", "uskd", "frskd for segmentation"], 2, folder)
    draws = Draws()
    train("none", folder / "run", processes=2, mix=draws, gradient_accumulation_steps=2, max_steps=2)
    options = {"ema_decay": 0.5, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = train("frskd on a ResNet", folder / f"written{rank}", processes=2, batch_norm=True, **options)
    state = trained_state(trainer)
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank)
    average_batch_norm(norm)
    planes = torch.nn.Module()
    planes.register_buffer("weight", torch.tensor(float(rank + 5)))
    broadcast_buffers(planes)
    found = {"draws": draws.drawn, "state": state, "mean": norm.running_mean, "planes": planes.weight}
    found["flags"] = [on_any_process(flag) for flag in (rank == 1, torch.tensor(rank == 0), False)]
    torch.save(found, folder / f"work{rank}.pt")


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_in_processes(work, 2, folder)
    return folder


def test_two_processes_train_what_one_trains(worked):
    found, other = (torch.load(worked / f"rank{rank}.pt") for rank in range(2))
    assert max(check_cases(found, [other], worked).values()) < 2e-5


def test_each_process_mixes_by_seed_and_step(worked, tmp_path):
    first, second = (torch.load(worked / f"work{rank}.pt")["draws"] for rank in range(2))
    assert len(set(first + second)) == 8  # two steps of two batches on two processes
    alone = Draws()
    options = {"processes": 1, "gradient_accumulation_steps": 2, "max_steps": 2, "per_device_train_batch_size": 6}
    train("none", tmp_path, mix=alone, save_strategy="steps", save_steps=1, **options)
    assert alone.drawn == first
    resumed = Draws()
    train("none", tmp_path, mix=resumed, resume=str(tmp_path / "checkpoint-1"), **options)
    assert resumed.drawn == first[2:]


def test_only_the_first_process_writes(worked):
    files = {path.name for path in (worked / "written1").rglob("*") if path.is_file()}
    assert files == {"rng_state_1.pth", "process_1.safetensors"}  # one of each process
    written = {path.name for path in (worked / "written0" / "checkpoint-4").iterdir()}
    assert {"model.safetensors", "scaffold.safetensors", "ema.safetensors", "method.json"} <= written


def test_processes_agree(worked):
    first, second = (torch.load(worked / f"work{rank}.pt") for rank in range(2))
    assert any(name.endswith("running_var") for name in first["state"])
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
    for found in (first, second):
        assert found["mean"].tolist() == [0.5, 0.5]
        assert found["planes"] == 5
        assert found["flags"] == [True, True, False]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_batch_norm_can_be_synchronised(build, batch, backbone):
    """With one process synchronised batch norm equals batch norm; with several it needs GPUs."""
    method = get_method("frskd")
    model = build(backbone).train()
    model.scaffold = method.scaffold(model)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    assert len([module for module in converted.modules() if isinstance(module, torch.nn.SyncBatchNorm)]) == len(norms)
    expected, found = model(batch["pixel_values"]), converted(batch["pixel_values"])
    for logits, others in zip(found.exit_logits, expected.exit_logits, strict=True):
        torch.testing.assert_close(logits, others)
    torch.testing.assert_close(found.scaffold["logits"], expected.scaffold["logits"])


@pytest.mark.parametrize(
    "processes", [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.exhaustive)]
)
def test_every_method_trains_the_same(tmp_path, processes):
    run_in_processes(train_cases, processes, list(CASES), processes, tmp_path)
    found, *others = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(processes))
    differences = check_cases(found, others, tmp_path)
    print("\n".join(f"{processes} processes, {case}: {value:.1e}" for case, value in differences.items()))
    assert max(differences.values()) < 2e-5


def test_one_process_agrees_with_itself():
    assert on_any_process(torch.tensor(True)) is True
    assert on_any_process(False) is False
