"""Hyper-parameter search, over those of the method too."""

import pytest
import torch

from hf_selfkd import SelfDistillationTrainer, get_method
from hf_selfkd.training.hyper_parameters import direction_of, headline_metric, names_of, with_values

optuna = pytest.importorskip("optuna")


@pytest.fixture
def search(build, train, monkeypatch):
    """Search with three trials, whose accuracy an evaluation makes up, and return the trainer and the best run."""

    def search(method, hp_space, accuracies=(0.1, 0.3, 0.2), **options):
        trainer = train(None, method, max_steps=1, trainer_kwargs={"model_init": lambda: build()})
        trainer.methods, results = [], iter(accuracies)

        def evaluate(**kwargs):
            trainer.methods.append(trainer.method)
            accuracy = next(results)  # with a calibration error that grows as the model diverges
            return {"eval_accuracy": accuracy, "eval_loss": 9 * accuracy, "eval_calibration_error": 1 - accuracy}

        monkeypatch.setattr(trainer, "evaluate", evaluate)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return trainer, trainer.hyperparameter_search(hp_space, n_trials=3, backend="optuna", **options)

    return search


def test_the_best_run_is_the_most_accurate(search):
    seen = []

    def space(trial):
        seen.append(trial.number)
        return {
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.02),
            "alpha": [0.1, 0.2, 0.4][trial.number],
        }

    trainer, best = search("byot", space)
    assert best.objective == 0.3
    assert best.run_id == "1"
    assert 0.01 <= trainer.args.learning_rate <= 0.02
    assert [method.alpha for method in trainer.methods] == [0.1, 0.2, 0.4]
    assert trainer.method == get_method("byot")
    assert trainer.search_space is None


def test_one_objective_of_ones_own_is_minimised_as_in_transformers(search):
    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.02)}

    _, best = search("none", space, compute_objective=lambda metrics: metrics["eval_loss"])
    assert best.run_id == "0"


def test_unknown_names_are_refused(search):
    with pytest.raises(ValueError, match="names 'alhpa', which is neither .* of byot .*Did you mean 'alpha'"):
        search("byot", lambda trial: {"alhpa": 0.5})


def test_hyper_parameters_by_name():
    both = get_method("eed+lsh")
    assert {"eed.temperature", "lsh.num_hashes"} <= set(names_of(both))
    changed = with_values(both, {"eed.temperature": 5.0, "lsh.num_hashes": 7})
    assert changed == get_method("eed+lsh", eed={"temperature": 5.0}, lsh={"num_hashes": 7})
    with pytest.raises(ValueError, match="BYOT needs 0 <= alpha <= 1"):
        with_values(get_method("byot"), {"alpha": 2.0})


def test_directions_that_contradict_the_objective_are_refused():
    assert direction_of(None, None) == direction_of("maximize", None) == "maximize"
    assert direction_of(None, max) == "minimize"
    assert direction_of(["minimize", "maximize"], max) == ["minimize", "maximize"]
    for direction in ("minimize", ["maximize", "minimize"]):
        with pytest.raises(ValueError, match="which direction=.* contradicts"):
            direction_of(direction, None)


def test_the_objective_follows_the_task(build_segmenter, build):
    for model, name in ((build_segmenter(), "eval_mean_iou"), (build(), "eval_accuracy")):
        trainer = SelfDistillationTrainer(model, method="none")
        assert headline_metric(trainer, {name: 0.5, "eval_loss": 1.0}) == 0.5
        with pytest.raises(ValueError, match=f"is {name}, but the evaluation has eval_first_accuracy"):
            headline_metric(trainer, {"eval_first_accuracy": torch.inf})
