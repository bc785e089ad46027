"""Cards: metadata, tables and snippets, and what writing one costs."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from torch import nn
from transformers import TrainingArguments

from hf_selfkd import (
    ExitPolicy,
    MultiExitForImageClassification,
    SelfDistillationTrainer,
    calibrate,
    get_method,
    list_methods,
)
from hf_selfkd.evaluation.costs import exit_counts
from hf_selfkd.methods.combination import Combination
from hf_selfkd.model_card import CardFacts, card_metadata, update_model_card, write_model_card
from hf_selfkd.model_card.environment import current_commit, device_name
from hf_selfkd.model_card.facts import source_of_weights
from hf_selfkd.model_card.values import cite, example
from tests.helpers.cards import cited_by, percents_of, sections_of, table_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train two methods at once for a few steps, evaluate, and save: the trainer, its metrics and the card."""
    torch.manual_seed(0)
    samples = [{"pixel_values": torch.randn(3, 32, 32) + index % 5 - 2, "labels": index % 5} for index in range(30)]
    model = MultiExitForImageClassification.from_backbone("test_resnet", num_labels=5, small_input_stem=True)
    args = TrainingArguments(
        str(tmp_path_factory.mktemp("runs") / "stripes-run"),
        num_train_epochs=2,
        per_device_train_batch_size=10,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        weight_decay=5e-4,
        optim="sgd",
        optim_args="momentum=0.9",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SelfDistillationTrainer(
        model,
        args,
        get_method("eed+lsh", eed={"feature_weight": 0.5}),
        train_dataset=samples,
        eval_dataset=samples[:20],
        lr_milestones=[1.0, 1.5],
        ema_decay=0.5,
        card={
            "dataset": "stripes",
            "license": "apache-2.0",
            "recipe": {"horizontal_flip": True},
            "latency": True,
            "commit": True,
        },
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return trainer, metrics, ModelCard.load(Path(args.output_dir) / "README.md")


def test_metadata_for_the_hub(run):
    _, metrics, card = run
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert {"multi-exit", "self-distillation", "early-exit", "timm", "eed", "lsh"} <= set(data["tags"])
    assert data["license"] == "apache-2.0" and data["metrics"] == ["accuracy"]
    assert "datasets" not in data and "base_model" not in data  # stripes are not on the Hub, the weights are new
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "stripes-run"
    assert {(result.task_type, result.dataset_name, result.metric_type) for result in results} == {
        ("image-classification", "stripes", "accuracy")
    }
    expected = {f"accuracy (exit {exit})": metrics[f"eval_exit_{exit}_accuracy"] for exit in range(4)}
    expected["accuracy (ensemble)"] = metrics["eval_ensemble_accuracy"]
    found = {result.metric_name: result.metric_value for result in results}
    assert found == pytest.approx(expected, abs=5e-5)
    assert ModelCard(str(card)).data.to_dict() == data  # nothing is lost on the way through the Hub


def test_results_are_the_metrics_and_counts(run):
    trainer, metrics, card = run
    results = sections_of(card.text)["Results"]
    rows = table_of(results, "exit")
    costs, parameters = exit_counts(trainer.model)
    assert [row["exit"] for row in rows] == ["0", "1", "2", "3", "ensemble"]
    for exit, row in enumerate(rows[:4]):
        assert float(row["accuracy (%)"]) == pytest.approx(100 * metrics[f"eval_exit_{exit}_accuracy"], abs=0.01)
        error = metrics[f"eval_exit_{exit}_calibration_error"]
        assert float(row["calibration error (%)"]) == pytest.approx(100 * error, abs=0.01)
        assert float(row["multiply-adds (M)"]) == pytest.approx(costs[exit] / 1e6, abs=0.01)
        assert float(row["parameters (M)"]) == pytest.approx(parameters[exit] / 1e6, abs=1e-3)
        assert float(row["latency (ms)"]) > 0
    assert f"float32 on {device_name(torch.device('cpu'))}" in results and "20 images of stripes" in results
    (picture,) = re.findall(r"!\[.+?\]\((.+?)\)", card.text)
    assert Image.open(Path(trainer.args.output_dir) / picture).size[0] > 300


def test_recipe_lists_what_differs_from_the_defaults(run):
    _, _, card = run
    training = sections_of(card.text)["Training"]
    assert {row["setting"]: row["value"] for row in table_of(training, "setting")} == {
        "num_train_epochs": "2",
        "learning_rate": "0.01",
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "weight_decay": "0.0005",
        "per_device_train_batch_size": "10",
        "gradient_accumulation_steps": "2",
        "seed": "42",
        "lr_milestones": "1, 1.5",
        "lr_gamma": "0.1",
        "ema_decay": "0.5",
        "device": device_name(torch.device("cpu")),
        "horizontal_flip": "true",
    }
    assert "30 images" in training and "`eed.feature_weight` 0.5" in training
    assert all(f"{module.__name__} {module.__version__}" in training for module in (timm, torch))
    assert current_commit().removesuffix("-dirty") in training


def test_both_papers_are_cited_and_no_other(run):
    _, _, card = run
    assert cited_by(card.text) == ["lee2021students", "wang2021distilling"]


def test_no_path_of_this_machine_is_published(run):
    trainer, _, card = run
    folder = Path(trainer.args.output_dir)
    for text in (str(card), (folder / "card_facts.json").read_text()):
        assert str(folder.parent) not in text
        assert not re.search(r"[\s`\"'(]/\w", text)


def run_snippet(card: ModelCard, checkpoint: str, folder: Path) -> str:
    """Run the card's Python where this library is not installed, next to the checkpoint and a photo."""
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    Image.effect_noise((64, 64), 100).save(folder / "photo.png")
    (folder / Path(checkpoint).name).symlink_to(checkpoint)
    code = "import sys\nsys.modules['hf_selfkd'] = None\n" + snippet
    process = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.slow
def test_the_snippet_runs_without_this_library(run, tmp_path):
    trainer, _, card = run
    assert run_snippet(card, trainer.args.output_dir, tmp_path).startswith("LABEL_")


def test_arguments_take_precedence_over_what_is_known(run):
    trainer, _, _ = run
    folder = Path(trainer.args.output_dir)
    given = {"dataset_tags": "owner/stripes", "finetuned_from": "owner/base", "language": "en", "license": "mit"}
    trainer.create_model_card(model_name="named", tags=["extra", "timm"], **given)  # as push_to_hub calls it
    card = ModelCard.load(folder / "README.md")
    trainer.create_model_card()
    assert card.data.tags.count("timm") == 1 and card.data.tags[-1] == "extra"
    assert card.data.license == "mit" and card.data.language == "en"
    assert card.data.datasets == ["owner/stripes"] and card.data.base_model == "owner/base"
    assert card.data.eval_results[0].dataset_type == "owner/stripes"
    assert card.text.lstrip().startswith("# named\n") and 'model="stripes-run"' in card.text


@pytest.mark.slow
def test_saving_runs_no_forward_pass_and_no_process(build, train, monkeypatch, tmp_path):
    trainer = train(build(), max_steps=1)
    trainer.evaluate()
    passes = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"{args} was started"))
    constructed, construct = [], MultiExitForImageClassification.__init__

    def record(self, *args, **kwargs):
        constructed.append(self)
        construct(self, *args, **kwargs)

    monkeypatch.setattr(MultiExitForImageClassification, "__init__", record)

    def count(module, args):
        if not any(tensor.is_meta for tensor in args if isinstance(tensor, torch.Tensor)):
            passes.append(module)

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        trainer.save_model()
        assert passes == [] and len(constructed) == 1  # the twin on the meta device
        text = (tmp_path / "run" / "README.md").read_text()
        assert "latency (ms)" not in text and "ommit" not in text and "multiply-adds (M)" in text
        trainer.create_model_card(latency=True)
    finally:
        handle.remove()
    assert sum(module is trainer.model.backbone.conv1 for module in passes) == 11  # ten runs and one to warm up
    assert "latency (ms)" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_an_evaluation_of_other_weights_is_left_out(build, images, train, tmp_path):
    trainer = train(build(), max_steps=1)
    assert trainer.card_recorder.evaluations == {}
    metrics = trainer.evaluate()
    trainer.predict(images)
    ((prefix, evaluation),) = trainer.card_recorder.evaluations.items()
    assert (prefix, evaluation.metrics, evaluation.num_images) == ("eval", metrics, 20)
    trainer.train()
    assert trainer.card_recorder.evaluations == {}
    trainer.save_model(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.eval_results is None and card.data.metrics is None
    assert "accuracy (%)" not in card.text and "multiply-adds (M)" in card.text
    assert not (tmp_path / "saved" / "anytime_curve.png").exists()


@pytest.mark.slow
def test_results_on_several_datasets_and_under_another_prefix(build, images, train, tmp_path):
    sets = {"clean": images[:10], "noisy": images[10:]}
    trainer = train(build(), max_steps=1, trainer_kwargs={"eval_dataset": sets, "card": {"dataset": "stripes"}})
    metrics = trainer.evaluate() | trainer.evaluate(images[:5], metric_key_prefix="test")
    trainer.save_model()
    for _ in range(2):  # and again from the stored facts
        card = ModelCard.load(tmp_path / "run" / "README.md")
        results = sections_of(card.text)["Results"]
        parts = dict(
            zip(["", "eval_clean", "eval_noisy", "test"], re.split("^### On ", results, flags=re.M), strict=True)
        )
        assert "accuracy" not in parts.pop("")
        for prefix, part in parts.items():
            assert part.startswith(f"{prefix.removeprefix('eval_')} ({5 if prefix == 'test' else 10} images)")
            assert "multiply-adds" not in part
            found = {row["exit"]: float(row["accuracy (%)"]) for row in table_of(part, "exit")}
            expected = {str(exit): 100 * metrics[f"{prefix}_exit_{exit}_accuracy"] for exit in range(4)}
            assert found == pytest.approx(
                expected | {"ensemble": 100 * metrics[f"{prefix}_ensemble_accuracy"]}, abs=0.01
            )
        assert {result.dataset_split for result in card.data.eval_results} == {"clean", "noisy", "test"}
        assert len(card.data.eval_results) == 15
        update_model_card(trainer.model, tmp_path / "run")


def test_metrics_of_ones_own(build, images, train, tmp_path):
    def own(prediction):
        return {"f1": 0.25, "exit_0_f1": 0.125, "undefined": float("nan")}

    trainer = train(build(), max_steps=1, trainer_kwargs={"compute_metrics": own})
    trainer.evaluate()
    trainer.create_model_card()
    rows = table_of(sections_of((tmp_path / "run" / "README.md").read_text())["Results"], "metric")
    assert rows == [{"metric": "f1", "value": "0.25"}, {"metric": "exit_0_f1", "value": "0.125"}]
    trainer.evaluate(images[:3], metric_key_prefix="test")
    trainer.create_model_card()
    assert (tmp_path / "run" / "README.md").read_text().count("| f1 | 0.25 |") == 2


def test_a_card_without_matplotlib_has_no_picture(build, train, tmp_path, monkeypatch):
    trainer = train(build(), max_steps=1)
    trainer.evaluate()
    trainer.save_model(tmp_path / "with")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trainer.save_model(tmp_path / "without")
    cards = [(tmp_path / name / "README.md").read_text() for name in ("with", "without")]
    assert ["anytime_curve.png" in card for card in cards] == [True, False]
    assert [(tmp_path / name / "anytime_curve.png").exists() for name in ("with", "without")] == [True, False]


def test_the_best_weights_come_with_their_own_accuracy(build, train, tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = train(build(), num_train_epochs=3, learning_rate=0.5, metric_for_best_model="eval_accuracy", **options)
    best = trainer.state.best_global_step
    assert best < trainer.state.global_step, "the last epoch was the best, which shows nothing"
    (logged,) = [log for log in trainer.state.log_history if log["step"] == best and "eval_loss" in log]
    assert trainer.card_recorder.evaluations["eval"].metrics["eval_exit_0_accuracy"] == logged["eval_exit_0_accuracy"]
    assert trainer.evaluate()["eval_exit_0_accuracy"] == logged["eval_exit_0_accuracy"]
    trainer.create_model_card()
    recipe = table_of((tmp_path / "run" / "README.md").read_text(), "setting")
    assert {"setting": "best step", "value": f"{best} of 12"} in recipe
    assert {"setting": "metric_for_best_model", "value": "eval_accuracy"} in recipe


def test_an_optimizer_of_ones_own_replaces_the_arguments(build, tmp_path, train):
    model = build()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.5)
    mix = torch.nn.Identity()
    mix.forward = lambda images, labels: (images, labels)
    kwargs = {"trainer_kwargs": {"optimizers": (optimizer, None), "mix": mix}}
    trainer = train(model, max_steps=2, **kwargs)
    trainer.state.global_step = 1  # as if it had been stopped
    trainer.create_model_card()
    rows = table_of((tmp_path / "run" / "README.md").read_text(), "setting")
    recipe = {row["setting"]: row["value"] for row in rows}
    assert recipe["optimizer"] == "Adagrad" and recipe["mix"] == "Identity"
    assert recipe["steps trained"] == "1 of 2"
    assert not {"learning_rate", "optim"} & recipe.keys()


def test_a_model_without_training_and_exits(build, tmp_path):
    write_model_card(build(exits=[]), tmp_path, CardFacts(name="plain", repository="owner/plain"))
    card = ModelCard.load(tmp_path / "README.md")
    assert sections_of(card.text).keys() == {"Use", "Results"}
    assert "3x32x32" in card.text and "`test_resnet`" in card.text and "3x3 stride-1 stem" in card.text
    assert 'model="owner/plain"' in card.text
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "card_facts.json"}
    assert card.data.tags == build().model_tags


def test_metrics_that_are_not_finite_are_left_out(build, tmp_path):
    names = [*(f"exit_{exit}_accuracy" for exit in range(4)), "ensemble_accuracy"]
    metrics = {f"eval_{name}": float("nan") for name in names}
    write_model_card(build(), tmp_path, CardFacts(name="plain", repository="plain", dataset="d", metrics=metrics))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "nan" not in sections_of(card.text)["Results"]
    assert "NaN" not in (tmp_path / "card_facts.json").read_text()


def test_one_exit_has_no_ensemble(build, tmp_path):
    metrics = {f"eval_{name}": 0.5 for name in ("exit_0_accuracy", "ensemble_accuracy", "exit_0_calibration_error")}
    facts = CardFacts(name="plain", repository="plain", dataset="stripes", metrics=metrics, recipe={"bf16": True})
    write_model_card(build(exits=[]), tmp_path, facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert [result.metric_name for result in card.data.eval_results] == ["accuracy (exit 0)"]
    results = sections_of(card.text)["Results"]
    assert "of stripes, in bf16" in results
    assert [row["exit"] for row in table_of(results, "exit")] == ["0"]


def test_measuring_keeps_the_mode_of_the_model(build, train):
    trainer = train(build(), max_steps=1)
    trainer.model.train()
    trainer.create_model_card(latency=True)
    assert trainer.model.training and trainer.model.exits[0].training


@pytest.mark.parametrize("source", ["timm", "hub", "file"])
def test_the_base_model_is_where_timm_fetched_the_weights(monkeypatch, tmp_path, source):
    create = timm.create_model

    def create_offline(name, pretrained=False, **kwargs):
        """Build what timm builds with pretrained weights, but without fetching them."""
        model = create("test_resnet.r160_in1k", **kwargs)
        if source == "file":
            model.pretrained_cfg["file"] = "weights.safetensors"
        if source == "hub":
            model.pretrained_cfg["hf_hub_id"] = "owner/flowers"
        return model

    monkeypatch.setattr(timm, "create_model", create_offline)
    name = {"hub": "hf-hub:owner/flowers"}.get(source, "test_resnet.r160_in1k")
    model = MultiExitForImageClassification.from_backbone(name, pretrained=True, num_labels=5)
    expected = {"timm": "timm/test_resnet.r160_in1k", "hub": "owner/flowers", "file": None}[source]
    facts = CardFacts(name="a", repository="a", base_model=source_of_weights(model))
    assert card_metadata(model, facts).base_model == expected
    assert source_of_weights(MultiExitForImageClassification(model.config)) == expected
    new = MultiExitForImageClassification.from_backbone(name, num_labels=5)
    assert source_of_weights(new) is None
    new.save_pretrained(tmp_path)
    assert source_of_weights(MultiExitForImageClassification.from_pretrained(tmp_path)) is None  # a folder


def early_exit_section(model, folder, **facts) -> str:
    write_model_card(model, folder, CardFacts(name="a", repository="a", **facts))
    return sections_of((folder / "README.md").read_text())["Early exit"]


def calibrated(**constraint):
    """Return a policy of four exits, calibrated on the logits of 1,200 images."""
    labels = torch.arange(1200) % 5
    logits = torch.stack([torch.randn(1200, 5) + k * torch.eye(5)[labels] for k in (1.5, 2.0, 3.0, 4.0)])
    reference = None if constraint.pop("unlabelled", False) else labels
    return calibrate(logits, reference, [1.0, 2.0, 3.0, 4.0], **constraint)


@pytest.mark.parametrize(
    ("constraint", "figures", "has_guarantee"),
    [
        ({"target_cost": 0.6}, ["0.6 of the full cost"], False),
        ({"max_accuracy_drop": 0.01}, ["at most 1 percentage point of accuracy"], False),
        ({"max_risk": 0.05, "delta": 0.1}, ["probability 0.9 ", "at most 5 percentage points"], True),
        ({"max_risk": 0.1, "unlabelled": True}, ["probability 0.95 ", "agreement", "at most 10%"], True),
    ],
    ids=["cost", "drop", "risk", "unlabelled"],
)
def test_a_policy_comes_with_its_calibration(build, tmp_path, constraint, figures, has_guarantee):
    model, policy = build(), calibrated(**constraint)
    model.config.exit_policy = policy.to_dict()
    text = early_exit_section(model, tmp_path)
    record = policy.calibration
    assert "Calibrated on 1,200 images" in text and all(figure in text for figure in figures)
    assert ("Guarantee" in text) == has_guarantee
    assert round(100 * record["expected_accuracy"], 2) in percents_of(text)
    assert f"{record['expected_cost']:.3f} of the full cost" in text
    assert ("agreement with the final exit" in text) == ("unlabelled" in constraint)
    rows = table_of(text, "exit")
    assert [float(row["temperature"]) for row in rows] == pytest.approx(list(policy.temperatures), rel=1e-3)
    assert [float(row["threshold"]) for row in rows[:3]] == pytest.approx(list(policy.thresholds), rel=1e-3)
    assert rows[-1]["threshold"] == "always"
    model.config.early_exit = True
    assert early_exit_section(model, tmp_path) != text
    assert "Calibrated on" not in early_exit_section(model, tmp_path, has_old_policy=True)


def test_no_policy_an_impossible_one_and_one_set_by_hand(build, tmp_path):
    model = build()
    text = early_exit_section(model, tmp_path)
    assert "hf_selfkd.calibrate" in text and "|" not in text
    record = {"demand": {"max_risk": 0.1, "delta": 0.05}, "samples": 50, "reference": "labels"}
    record |= {"expected_accuracy": 0.5, "expected_cost": 1.0, "full_accuracy": 0.5}
    model.config.exit_policy = ExitPolicy(thresholds=[2.0] * 3, calibration=record).to_dict()
    text = early_exit_section(model, tmp_path)
    assert "no image exits early" in text and "Guarantee" not in text and percents_of(text) == []
    assert [row["threshold"] for row in table_of(text, "exit")] == ["never"] * 3 + ["always"]
    model.config.exit_policy = ExitPolicy(criterion="patience", thresholds=[0, 2, 2]).to_dict()
    text = early_exit_section(model, tmp_path)
    assert "Calibrated" not in text and "patience" in text and "the exit's temperature" not in text
    assert [row["threshold"] for row in table_of(text, "exit")] == ["always", "never", "2", "always"]


def test_a_policy_from_before_the_training_promises_nothing(build, train, tmp_path):
    model = build()
    model.config.exit_policy = calibrated(target_cost=0.6).to_dict()
    trainer = train(model, max_steps=1)
    trainer.create_model_card()
    text = sections_of((tmp_path / "run" / "README.md").read_text())["Early exit"]
    assert "unknown" in text and percents_of(text) == []
    model.config.exit_policy = calibrated(target_cost=0.7).to_dict()
    trainer.create_model_card()
    text = sections_of((tmp_path / "run" / "README.md").read_text())["Early exit"]
    assert "0.7 of the full cost" in text and "unknown" not in text


def test_every_method_of_the_library_has_its_paper():
    methods = [
        get_method(name) for name in list_methods() if type(get_method(name)).__module__.startswith("hf_selfkd")
    ]
    assert {method.name for method in methods if not cite([method.paper])} == {"none"}  # the baseline
    known = (ROOT / "CITATION.cff").read_text()
    cited = cite(Combination(methods=tuple(methods)).paper.split(", "))
    for url in re.findall(r'url: "(https://arxiv.org/abs/\S+)"', known):
        assert url in cited
    families = re.findall(r"family-names: ([^,]+),", known)
    assert all(family in cited for family in families)


@pytest.mark.slow
def test_the_snippet_of_segmentation_runs_without_this_library(build_segmenter, tmp_path):
    checkpoint = tmp_path / "parts"
    model = build_segmenter(num_labels=3)
    model.save_pretrained(checkpoint)
    write_model_card(model, checkpoint, CardFacts(name="parts", repository="parts"))
    (tmp_path / "work").mkdir()
    printed = run_snippet(ModelCard.load(checkpoint / "README.md"), str(checkpoint), tmp_path / "work")
    assert printed.startswith("LABEL_") and "(64, 64)" in printed


def test_segmentation(build_segmenter, train, tmp_path):
    maps = [
        {"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(3, (32, 32), dtype=torch.uint8)}
        for _ in range(4)
    ]
    card_options = {"dataset": "camvid", "latency": True}  # which is measured for classification only
    trainer = train(
        build_segmenter(num_labels=3),
        "frskd",
        max_steps=1,
        trainer_kwargs={"train_dataset": maps, "eval_dataset": maps, "card": card_options},
    )
    metrics = trainer.evaluate()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.pipeline_tag == "image-segmentation" and card.data.metrics == ["mean_iou"]
    assert "frskd" in card.data.tags and "early-exit" not in card.data.tags
    rows = table_of(card.text, "exit")
    for exit in range(trainer.model.num_exits):
        value = metrics[f"eval_exit_{exit}_mean_iou"]
        assert float(rows[exit]["mean IoU (%)"]) == pytest.approx(100 * value, abs=0.01)
        assert card.data.eval_results[exit].metric_value == pytest.approx(value, abs=5e-5)
    assert "Early exit" not in sections_of(card.text)
    inference = trainer.model.num_parameters()
    assert f"{inference / 1e6:.3f} million" in sections_of(card.text)["Results"]
    assert yaml.safe_load(str(card).split("---")[1])["pipeline_tag"] == "image-segmentation"


def test_the_card_of_a_network_that_no_pipeline_reads_images_for_loads_the_model(build):
    def snippet(in_chans):
        model = build(backbone_kwargs={"in_chans": in_chans})
        return example(model, "ada/run")

    assert "pipeline(" in snippet(1)
    code = snippet(4).replace("from transformers import AutoModelForImageClassification", "")
    model = build(backbone_kwargs={"in_chans": 4}).eval()
    loader = SimpleNamespace(from_pretrained=lambda name, trust_remote_code: model)
    exec(code, {"AutoModelForImageClassification": loader})
    assert "pipeline(" not in code
