"""The progress bar and the table of exits."""

import pytest
import torch
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from hf_selfkd import SelfDistillationTrainer
from hf_selfkd.training import ProgressTable
from tests.helpers.recipe import PLAIN_SGD

EPOCHS = {"num_train_epochs": 2, "logging_strategy": "epoch", "eval_strategy": "epoch"}
HEADER = "epoch loss exit 0 exit 1 exit 2 exit 3 ensemble".split()


@pytest.fixture
def watch(tmp_path, images, capfd):
    """Train under a ProgressTable; return the trainer, the words of each line on stdout and the text on stderr."""

    def watch(model, method="byot", metric="accuracy", data=images, **args):
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=10, **PLAIN_SGD | EPOCHS | args)
        trainer = SelfDistillationTrainer(model, args, method, train_dataset=data, eval_dataset=data)
        trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        trainer.add_callback(ProgressTable(metric))
        trainer.train()
        printed = capfd.readouterr()
        return trainer, [line.split() for line in printed.out.splitlines()], printed.err

    return watch


def test_a_row_per_evaluation_holds_what_was_logged(watch, build):
    trainer, (header, *rows), _ = watch(build())
    assert header == HEADER
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert len(rows) == len(evaluations) == len(losses) == 2
    for row, loss, metrics in zip(rows, losses, evaluations, strict=True):
        scores = [metrics[f"eval_{name}_accuracy"] for name in ("exit_0", "exit_1", "exit_2", "exit_3", "ensemble")]
        assert float(row[0]) == metrics["epoch"]
        assert [float(value) for value in row[1:]] == pytest.approx([loss, *(100 * s for s in scores)], abs=0.005)


def test_the_bar_is_the_only_other_output_and_can_be_hidden(watch, build):
    _, rows, bar = watch(build(), disable_tqdm=False)
    assert len(rows) == 3
    assert "4/4" in bar and "evaluating" in bar
    assert "3/3" not in bar  # of the three batches of an evaluation
    _, rows, bar = watch(build())
    assert len(rows) == 3
    assert "4/4" not in bar


def test_losses_are_the_rows_where_nothing_is_evaluated(watch, build):
    trainer, (header, *rows), _ = watch(build(), eval_strategy="no")
    assert header == ["epoch", "loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [float(row[1]) for row in rows] == pytest.approx(losses, abs=5e-5)


def test_evaluation_outside_training_has_a_bar_and_no_row(watch, build, capfd):
    trainer, _, _ = watch(build(), disable_tqdm=False)
    trainer.evaluate()
    printed = capfd.readouterr()
    assert "3/3" in printed.err
    assert printed.out == ""


def test_the_bar_of_a_resumed_run_starts_where_it_stopped(watch, build):
    trainer, _, _ = watch(build(), disable_tqdm=False, save_strategy="epoch", num_train_epochs=1)
    assert trainer.state.global_step == 2
    table = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressTable))
    table.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert (table.training_bar.n, table.training_bar.total) == (2, 2)
    table.on_train_end(trainer.args, trainer.state, trainer.control)


def test_segmentation_shows_mean_iou(watch, build_segmenter):
    samples = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(5, (32, 32))} for _ in range(4)]
    trainer, (header, row, _), _ = watch(build_segmenter(), "deep_supervision", "mean_iou", samples)
    assert header[:3] == ["epoch", "loss", "exit"] and header[-1] == "ensemble"
    metrics = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert float(row[2]) == pytest.approx(100 * metrics["eval_exit_0_mean_iou"], abs=0.005)
    assert float(row[-1]) == pytest.approx(100 * metrics["eval_ensemble_mean_iou"], abs=0.005)
