"""The cards of the reference checkpoints, as the Hub would show them."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image

from hf_selfkd import list_methods

FOLDER = Path(__file__).parents[2] / "model_cards"
CARDS = sorted(path.parent.name for path in FOLDER.glob("*/README.md"))


@pytest.fixture(params=CARDS)
def card(request):
    """Return the name of a card and the card."""
    return request.param, ModelCard.load(FOLDER / request.param / "README.md")


def table_of(text: str, first: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first} |"))
    width = lines[start].count("|")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :]]
    return [row for row in rows if len(row) == width - 1]


def test_there_is_one_for_each_reference_checkpoint():
    assert CARDS == ["cifar10-small", "digits"]


def test_the_metadata_is_what_the_hub_reads(card):
    name, card = card
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert set(list_methods()) & set(data["tags"]) and {"multi-exit", "timm"} <= set(data["tags"])
    assert all(re.fullmatch(r"[\w.-]+", tag) for tag in data["tags"])
    assert "base_model" not in data, "they are trained from scratch"
    for dataset in data.get("datasets", []):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", dataset)
    model, results = model_index_to_eval_results(data["model-index"])
    assert model == name and eval_results_to_model_index(model, results) == data["model-index"]
    assert len({result.metric_name for result in results}) == len(results) == 5
    assert all(0 < result.metric_value <= 1 and result.metric_type == "accuracy" for result in results)


def test_the_numbers_of_the_table_are_those_of_the_metadata(card):
    rows = table_of(card[1].text, "exit")[:5]
    told = {f"accuracy ({name if name == 'ensemble' else f'exit {name}'})": float(value) for name, value, *_ in rows}
    known = {result.metric_name: round(100 * result.metric_value, 2) for result in card[1].data.eval_results}
    assert told == known
    for column in (3, 4, 5):  # what an image has cost grows with depth
        numbers = [float(row[column]) for row in rows[:4]]
        assert numbers == sorted(numbers) and numbers[0] > 0


def test_pictures_lie_beside_the_card_and_no_others(card):
    name, card = card
    shown = re.findall(r"!\[.+?\]\((.+?)\)", card.text)
    assert shown == ["anytime_curve.png", "early_exit.png"]
    assert sorted(path.name for path in (FOLDER / name).iterdir()) == sorted([*shown, "README.md"])
    for picture in shown:
        with Image.open(FOLDER / name / picture) as image:
            image.verify()
            assert image.format == "PNG" and image.size[0] > 300


def test_the_policy_and_the_training_are_told(card):
    text = card[1].text
    headings = re.findall("^## (.*)$", text, flags=re.MULTILINE)
    assert headings == ["Use", "Results", "Early exit", "Training", "Citation"]
    assert "`pipeline` leave early by themselves" in text and re.search(r"Calibrated on [\d,]+ images for", text)
    assert "transformers 5." in text and re.search("commit `[0-9a-f]{40}`", text)
    assert {row[0] for row in table_of(text, "setting")} >= {"learning_rate", "seed", "trained on", "crop_padding"}


def test_no_place_of_a_machine_is_told(card):
    assert not re.search(r"[\s`\"'(]/\w", str(card[1]))
