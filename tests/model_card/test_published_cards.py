"""The committed cards of the reference checkpoints are what their facts render to, and valid on the Hub."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image

from hf_selfkd import MultiExitConfig, MultiExitForImageClassification, list_methods
from hf_selfkd.model_card import write_model_card
from hf_selfkd.model_card.storage import load_facts
from tests.helpers.cards import percents_of, sections_of, table_of

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob("*/README.md"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_there_are_cards():
    assert FOLDERS


def test_the_card_is_what_its_facts_render_to(folder, tmp_path):
    """After a change of the template: ``python model_cards/generate.py --render``."""
    model = MultiExitForImageClassification(MultiExitConfig.from_pretrained(folder))
    write_model_card(model, tmp_path, load_facts(folder))
    for name in ("README.md", "card_facts.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_numbers_are_those_of_the_facts(folder):
    facts, config = load_facts(folder), MultiExitConfig.from_pretrained(folder)
    sections = sections_of((folder / "README.md").read_text())
    *exits, ensemble = table_of(sections["Results"], "exit")
    for name, row in [*((f"exit_{row['exit']}", row) for row in exits), ("ensemble", ensemble)]:
        assert float(row["accuracy (%)"]) == pytest.approx(100 * facts.metrics[f"eval_{name}_accuracy"], abs=0.006)
        error = facts.metrics[f"eval_{name}_calibration_error"]
        assert float(row["calibration error (%)"]) == pytest.approx(100 * error, abs=0.006)
    assert [float(row["latency (ms)"]) for row in exits] == pytest.approx(facts.latency["milliseconds"], abs=0.006)
    rows, policy = table_of(sections["Early exit"], "exit"), config.exit_policy
    assert [float(row["threshold"]) for row in rows[:-1]] == pytest.approx(policy["thresholds"], rel=1e-3)
    assert [float(row["temperature"]) for row in rows] == pytest.approx(policy["temperatures"], rel=1e-3)
    record = policy["calibration"]
    shares = [*(record[name] for name in ("expected_accuracy", "full_accuracy"))]
    shares += [facts.trial[name] for name in ("accuracy", "full_accuracy")]
    assert percents_of(sections["Early exit"]) == pytest.approx([100 * share for share in shares], abs=0.006)
    images_per_second = re.findall(r"(\d+) images/s", sections["Early exit"])
    assert [float(number) for number in images_per_second] == pytest.approx(
        [facts.trial["images_per_second"], facts.trial["plain_images_per_second"]], abs=0.5
    )
    assert facts.commit in sections["Training"]
    assert {row["setting"] for row in table_of(sections["Training"], "setting")} == facts.recipe.keys()


def test_the_metadata_is_valid_on_the_hub(folder):
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert set(list_methods()) & set(data["tags"]) and {"multi-exit", "timm"} <= set(data["tags"])
    assert all(re.fullmatch(r"[\w.-]+", tag) for tag in data["tags"])
    assert "base_model" not in data, "they are trained from scratch"
    for dataset in data.get("datasets", []):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", dataset)
    model, results = model_index_to_eval_results(data["model-index"])
    assert model == folder.name and eval_results_to_model_index(model, results) == data["model-index"]
    assert len({result.metric_name for result in results}) == len(results) == 5
    facts = load_facts(folder)
    for result in results:
        name = result.metric_name.removeprefix("accuracy (").removesuffix(")").replace(" ", "_")
        assert result.metric_type == "accuracy"
        assert result.metric_value == pytest.approx(facts.metrics[f"eval_{name}_accuracy"], abs=5e-5)


def test_pictures_are_next_to_the_card_and_no_others(folder):
    shown = re.findall(r"!\[.+?\]\((.+?)\)", (folder / "README.md").read_text())
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(shown) and len(shown) == 2
    for picture in shown:
        with Image.open(folder / picture) as image:
            image.verify()
            assert image.format == "PNG" and image.size[0] > 300


def test_no_path_of_a_machine_is_published(folder):
    for path in folder.glob("*.[mj]*"):
        assert not re.search(r"[\s`\"'(]/\w", path.read_text())
