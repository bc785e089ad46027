"""What a run tells about itself, and that nothing else is told."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from transformers import TrainingArguments

from hf_selfkd import (
    ExitPolicy,
    MultiExitForImageClassification,
    SelfDistillationTrainer,
    calibrate,
    exit_costs,
    get_method,
    list_methods,
)
from hf_selfkd.evaluation.costs import exit_parameters
from hf_selfkd.methods.combination import Combination
from hf_selfkd.model_card.card import card_metadata, update_model_card, write_model_card
from hf_selfkd.model_card.facts import CardFacts, changed_hyper_parameters, commit, machine, name_of, source_of_weights
from hf_selfkd.model_card.sections import cite, describe_policy

ROOT = Path(__file__).parents[2]


def table_of(text: str, first: str) -> list[dict[str, str]]:
    """Read the Markdown table whose first column has that title."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first} |"))
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


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
        card={"dataset": "stripes", "license": "apache-2.0", "recipe": {"horizontal_flip": True}},
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return trainer, metrics, ModelCard.load(Path(args.output_dir) / "README.md")


def test_metadata_says_what_the_hub_asks_for(run):
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
    expected = {f"accuracy (exit {exit})": metrics[f"eval_accuracy_exit_{exit}"] for exit in range(4)}
    expected["accuracy (ensemble)"] = metrics["eval_accuracy_ensemble"]
    found = {result.metric_name: result.metric_value for result in results}
    assert found == pytest.approx(expected, abs=5e-5)
    assert ModelCard(str(card)).data.to_dict() == data  # nothing is lost on the way through the Hub


def test_the_table_holds_what_was_measured_and_counted(run):
    trainer, metrics, card = run
    rows = table_of(card.text, "exit")
    assert [row["exit"] for row in rows[:5]] == ["0", "1", "2", "3", "ensemble"]
    for exit, row in enumerate(rows[:4]):
        assert float(row["accuracy (%)"]) == pytest.approx(100 * metrics[f"eval_accuracy_exit_{exit}"], abs=0.01)
        error = metrics[f"eval_calibration_error_exit_{exit}"]
        assert float(row["calibration error (%)"]) == pytest.approx(100 * error, abs=0.01)
        assert float(row["million multiply-adds"]) == pytest.approx(exit_costs(trainer.model)[exit] / 1e6, abs=0.01)
        parameters = exit_parameters(trainer.model)[exit]
        assert float(row["million parameters"]) == pytest.approx(parameters / 1e6, abs=1e-3)
        assert float(row["milliseconds"]) > 0
    assert f"in float32 on {machine(torch.device('cpu'))}" in card.text
    assert "Evaluated on 20 images of stripes." in card.text
    (picture,) = re.findall(r"!\[.+?\]\((.+?)\)", card.text)
    assert Image.open(Path(trainer.args.output_dir) / picture).size[0] > 300


def test_the_recipe_is_told_as_far_as_it_is_no_default(run):
    _, _, card = run
    recipe = {row["setting"]: row["value"] for row in table_of(card.text, "setting")}
    assert recipe == {
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
        "trained on": machine(torch.device("cpu")),
        "horizontal_flip": "true",
    }
    assert "Trained on 30 images." in card.text
    assert "Hyper-parameters that differ from the defaults: `eed.feature_weight` 0.5." in card.text
    for module in (timm, torch):
        assert f"{module.__name__} {module.__version__}" in card.text


def test_both_papers_are_cited_and_no_other(run):
    _, _, card = run
    assert re.findall(r"@\w+{(\w+),", card.text) == ["lee2021students", "wang2021distilling"]


def test_no_place_of_this_machine_is_told(run):
    trainer, _, card = run
    assert str(Path(trainer.args.output_dir).parent) not in str(card)
    assert not re.search(r"[\s`\"'(]/\w", str(card))


def run_snippet(card: ModelCard, checkpoint: str, folder: Path) -> str:
    """Run the card's Python where this library is not installed, beside the checkpoint and a photo."""
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(snippet.splitlines()) == 5
    Image.effect_noise((64, 64), 100).save(folder / "photo.png")
    (folder / Path(checkpoint).name).symlink_to(checkpoint)
    code = "import sys\nsys.modules['hf_selfkd'] = None\n" + snippet
    process = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def test_the_snippet_runs_without_this_library(run, tmp_path):
    trainer, _, card = run
    assert run_snippet(card, trainer.args.output_dir, tmp_path).startswith("LABEL_")


def test_what_is_given_goes_before_what_is_known(run):
    trainer, _, _ = run
    before = (Path(trainer.args.output_dir) / "README.md").read_text()
    given = {"dataset_tags": "owner/stripes", "finetuned_from": "owner/base", "language": "en", "license": "mit"}
    trainer.create_model_card(model_name="named", tags=["extra", "timm"], **given)  # as push_to_hub calls it
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert (
        card.data.tags.count("timm") == 1
        and card.data.tags[-1] == "extra"
        and card.data.license == "mit"
        and card.data.language == "en"
    )
    assert card.data.datasets == ["owner/stripes"] and card.data.base_model == "owner/base"
    assert card.data.eval_results[0].dataset_type == "owner/stripes"
    assert card.text.lstrip().startswith("# named\n") and 'model="stripes-run"' in card.text
    (Path(trainer.args.output_dir) / "README.md").write_text(before)


def test_an_evaluation_of_other_weights_is_left_out(build, images, train, tmp_path):
    trainer = train(build(), max_steps=1)
    assert trainer.evaluation is None
    metrics = trainer.evaluate()
    trainer.predict(images)
    assert trainer.evaluation.metrics == metrics and trainer.evaluation.num_images == 20
    trainer.train()
    assert trainer.evaluation is None
    trainer.save_model(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.eval_results is None and card.data.metrics is None
    assert "accuracy (%)" not in card.text and "million multiply-adds" in card.text
    assert not (tmp_path / "saved" / "anytime_curve.png").exists()


def test_the_best_weights_are_told_with_their_own_accuracy(build, train, tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = train(build(), num_train_epochs=3, learning_rate=0.5, metric_for_best_model="eval_accuracy", **options)
    best = trainer.state.best_global_step
    assert best < trainer.state.global_step, "the last epoch was the best, which shows nothing"
    (logged,) = [log for log in trainer.state.log_history if log["step"] == best and "eval_loss" in log]
    assert trainer.evaluation.metrics["eval_accuracy_exit_0"] == logged["eval_accuracy_exit_0"]
    assert trainer.evaluate()["eval_accuracy_exit_0"] == logged["eval_accuracy_exit_0"]
    trainer.create_model_card()
    recipe = table_of((tmp_path / "run" / "README.md").read_text(), "setting")
    assert {"setting": "best step", "value": f"{best} of 12"} in recipe
    assert {"setting": "metric_for_best_model", "value": "eval_accuracy"} in recipe


def test_an_optimizer_of_ones_own_is_told_in_the_place_of_the_arguments(build, images, tmp_path, train):
    model = build()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.5)
    mix = torch.nn.Identity()
    mix.forward = lambda images, labels: (images, labels)
    kwargs = {"trainer_kwargs": {"optimizers": (optimizer, None), "mix": mix}}
    trainer = train(model, max_steps=2, **kwargs)
    trainer.state.global_step = 1  # as if it had been stopped
    trainer.create_model_card()
    recipe = {
        row["setting"]: row["value"] for row in table_of((tmp_path / "run" / "README.md").read_text(), "setting")
    }
    assert recipe["optimizer"] == "Adagrad" and recipe["mix"] == "Identity"
    assert recipe["steps trained"] == "1 of 2"
    assert not {"learning_rate", "optim"} & recipe.keys()


def test_a_model_that_nobody_trained_is_told_by_itself(build, tmp_path):
    write_model_card(build(exits=[]), tmp_path, CardFacts(name="plain", repository="owner/plain"))
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Training" not in card.text and "## Early exit" not in card.text and "## Citation" not in card.text
    assert "An image classifier for images of 3x32x32: timm's `test_resnet` with a 3x3 stride-1 stem." in card.text
    assert 'model="owner/plain"' in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert card.data.tags == build().model_tags


def test_what_is_no_number_is_left_out(build, tmp_path):
    names = [*(f"accuracy_exit_{exit}" for exit in range(4)), "accuracy_ensemble"]
    metrics = {f"eval_{name}": float("nan") for name in names}
    write_model_card(build(), tmp_path, CardFacts(name="plain", repository="plain", dataset="d", metrics=metrics))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "nan" not in card.content.split("## Use")[1].split("## Early exit")[0]


def test_one_exit_is_no_ensemble(build, tmp_path):
    metrics = {f"eval_{name}": 0.5 for name in ("accuracy_exit_0", "accuracy_ensemble", "calibration_error_exit_0")}
    facts = CardFacts(name="plain", repository="plain", dataset="stripes", metrics=metrics, recipe={"bf16": True})
    write_model_card(build(exits=[]), tmp_path, facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert [result.metric_name for result in card.data.eval_results] == ["accuracy (exit 0)"]
    assert "Evaluated on the evaluation images of stripes in bf16. Multiply-adds" in card.text
    assert [row["exit"] for row in table_of(card.text, "exit")] == ["0"]


def test_writing_leaves_the_mode_of_the_model_alone(build, tmp_path):
    model = build().train()
    write_model_card(model, tmp_path, CardFacts(name="a", repository="a"))
    assert model.training and model.exits[0].training


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


def calibrated(**demand):
    """Return three exits' logits for 1,200 images and a policy for them."""
    labels = torch.arange(1200) % 5
    logits = torch.stack([torch.randn(1200, 5) + k * torch.eye(5)[labels] for k in (1.5, 2.0, 3.0, 4.0)])
    reference = None if demand.pop("unlabelled", False) else labels
    return calibrate(logits, reference, [1.0, 2.0, 3.0, 4.0], **demand)


@pytest.mark.parametrize(
    ("demand", "words"),
    [
        ({"target_cost": 0.6}, "the best accuracy within 0.6 of the full cost. Expected from them: accuracy "),
        ({"max_accuracy_drop": 0.01}, "the least cost with at most 1 percentage point of accuracy lost. Expected"),
        (
            {"max_risk": 0.05, "delta": 0.1},
            "Guarantee: with probability 0.9 over the draw of those images, at most 5 percentage points of accuracy "
            "are lost against the deepest exit on images drawn like them. It says nothing about data of another kind.",
        ),
        (
            {"max_risk": 0.1, "unlabelled": True},
            "at most 10 percentage points of agreement with the deepest exit are lost",
        ),
    ],
)
def test_a_policy_is_told_with_how_it_was_found(build, demand, words):
    model, policy = build(), calibrated(**demand)
    model.config.exit_policy = policy.to_dict()
    text = describe_policy(model)
    assert words in text and "Calibrated on 1,200 images for" in text
    record = policy.calibration
    assert f"{100 * record['expected_accuracy']:.2f} % at {record['expected_cost']:.3f} of the full cost" in text
    assert "`pipeline` do so with `config.early_exit` set to true" in text
    rows = table_of(text, "exit")
    assert [float(row["temperature"]) for row in rows] == pytest.approx(list(policy.temperatures), rel=1e-3)
    assert rows[-1]["leaves from"] == "always"
    model.config.early_exit = True
    assert "`pipeline` leave early by themselves" in describe_policy(model)
    assert "Calibrated on" not in describe_policy(model, is_old=True)


def test_a_policy_that_keeps_everybody_or_was_set_by_hand(build):
    model = build()
    assert "The checkpoint has no exit policy" in describe_policy(model)
    record = {"demand": {"max_risk": 0.1, "delta": 0.05}, "samples": 50, "reference": "labels"}
    record |= {"expected_accuracy": 0.5, "expected_cost": 1.0, "full_accuracy": 0.5}
    model.config.exit_policy = ExitPolicy(thresholds=[2.0] * 3, calibration=record).to_dict()
    text = describe_policy(model)
    assert "No setting met that, so nobody leaves early." in text and "Guarantee" not in text
    assert [row["leaves from"] for row in table_of(text, "exit")] == ["never"] * 3 + ["always"]
    model.config.exit_policy = ExitPolicy(criterion="patience", thresholds=[0, 2, 2]).to_dict()
    text = describe_policy(model)
    assert "Calibrated" not in text and "temperature." not in text
    assert [row["leaves from"] for row in table_of(text, "exit")] == ["always", "never", "2", "always"]


def test_a_policy_found_later_enters_the_card_and_leaves_the_rest_alone(build, tmp_path):
    model = build()
    facts = CardFacts(name="late", repository="late", method=get_method("byot"), recipe={"seed": 0}, dataset="d")
    write_model_card(model, tmp_path, facts)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("## Training", "## Notes\n\nBy hand.\n\n## Training"))
    before = path.read_text()
    model.config.exit_policy, model.config.early_exit = calibrated(max_risk=0.05).to_dict(), True
    trial = {"num_images": 60, "accuracy": 0.5, "full_accuracy": 0.52, "cost": 0.61, "picture": "early_exit.png"}
    trial |= {"images_per_second": 812.4, "plain_images_per_second": 640.0, "batch_size": 20}
    for _ in range(2):  # a second time changes nothing more
        update_model_card(model, tmp_path, trial)
        after = path.read_text()
        assert "no exit policy" not in after and "By hand." in after
        assert (
            "On 60 other images: accuracy 50.00 % at 0.610 of the full cost, against 52.00 % of the deepest" in after
        )
        assert "In batches of 20 of them on" in after
        assert "812 images per second, where the backbone alone takes in 640." in after
        assert "![Accuracy against mean cost](early_exit.png)" in after
        cited = ["zhang2019be", "guo2017calibration", "angelopoulos2021learn"]
        assert re.findall(r"@\w+{(\w+),", after) == cited
        assert re.findall("^## .*$", after, flags=re.MULTILINE) == re.findall("^## .*$", before, flags=re.MULTILINE)
        assert after.split("## Early exit")[0] == before.split("## Early exit")[0]
        assert (
            after.split("## Notes")[1].split("## Citation")[0] == before.split("## Notes")[1].split("## Citation")[0]
        )
        assert "\n\n\n" not in after


def test_a_title_in_a_block_of_code_begins_no_section(build, tmp_path):
    model, path = build(), tmp_path / "README.md"
    write_model_card(model, tmp_path, CardFacts(name="late", repository="late"))
    note = "## Early exit\n\n```bash\n## a comment\nls\n```\n"
    path.write_text(path.read_text().replace("## Early exit\n", note))
    model.config.exit_policy = calibrated(max_risk=0.05).to_dict()
    update_model_card(model, tmp_path)
    after = path.read_text()
    assert "## a comment" not in after and "no exit policy" not in after
    assert after.count("```") % 2 == 0


def test_a_folder_without_a_card_gets_one_with_its_policy(build, tmp_path):
    model = build()
    model.config.exit_policy = ExitPolicy(thresholds=[0.5, 0.6, 0.7]).to_dict()
    update_model_card(model, tmp_path / "new")
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert card.text.lstrip().startswith("# new\n") and "| 1 | 0.6 | 1 |" in card.text


def test_a_policy_from_before_the_training_promises_nothing(build, train, tmp_path):
    model = build()
    model.config.exit_policy = calibrated(target_cost=0.6).to_dict()
    trainer = train(model, max_steps=1)
    trainer.create_model_card()
    assert "It was calibrated before the last training: nothing is known" in (tmp_path / "run/README.md").read_text()
    model.config.exit_policy = calibrated(target_cost=0.7).to_dict()
    trainer.create_model_card()
    assert "the best accuracy within 0.7 of the full cost" in (tmp_path / "run/README.md").read_text()


def test_hyper_parameters_and_where_teachers_come_from(build, tmp_path):
    assert changed_hyper_parameters(get_method("byot")) == {}
    assert changed_hyper_parameters(get_method("byot", alpha=0.5)) == {"alpha": 0.5}
    kd = get_method("kd", teacher=timm.create_model("test_resnet.r160_in1k"))
    assert changed_hyper_parameters(kd) == {"teacher": "test_resnet.r160_in1k"}
    assert name_of(str(tmp_path)) == tmp_path.name and name_of("resnet50.a1_in1k") == "resnet50.a1_in1k"
    assert name_of(build()) == "MultiExitForImageClassification"
    build().save_pretrained(tmp_path / "teacher")
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path / "teacher")
    both = get_method("byot+lsh", lsh={"teacher": loaded})
    assert changed_hyper_parameters(both) == {"lsh.teacher": "teacher"}


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


def test_the_commit_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.txt").write_text("a")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"], ["tag", "v1"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit() == head
    (tmp_path / "a.txt").write_text("b")
    assert commit() == f"{head}-dirty"


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
    trainer = train(
        build_segmenter(num_labels=3),
        "frskd",
        max_steps=1,
        trainer_kwargs={"train_dataset": maps, "eval_dataset": maps, "card": {"dataset": "camvid"}},
    )
    metrics = trainer.evaluate()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.pipeline_tag == "image-segmentation" and card.data.metrics == ["mean_iou"]
    assert "frskd" in card.data.tags and "early-exit" not in card.data.tags
    rows = table_of(card.text, "exit")
    for exit in range(trainer.model.num_exits):
        value = metrics[f"eval_mean_iou_exit_{exit}"]
        assert float(rows[exit]["mean IoU (%)"]) == pytest.approx(100 * value, abs=0.01)
        assert card.data.eval_results[exit].metric_value == pytest.approx(value, abs=5e-5)
    assert "## Early exit" not in card.text
    scaffold = sum(parameter.numel() for parameter in trainer.model.scaffold.parameters())
    shipped = trainer.model.num_parameters() - scaffold
    assert f"The model has {shipped / 1e6:.3f} million parameters." in card.text
    assert yaml.safe_load(str(card).split("---")[1])["pipeline_tag"] == "image-segmentation"
