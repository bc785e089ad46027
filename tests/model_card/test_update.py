"""Cards rendered again from stored facts, and cards that were edited by hand."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, get_method
from hf_selfkd.model_card import CardFacts, method_facts, update_model_card, write_model_card
from tests.helpers.cards import cited_by, sections_of, table_of
from tests.helpers.models import build_copy

RECORD = {
    "demand": {"max_risk": 0.05, "delta": 0.1},
    "samples": 1200,
    "reference": "labels",
    "expected_accuracy": 0.5,
    "expected_cost": 0.6,
    "full_accuracy": 0.52,
}
POLICY = ExitPolicy(thresholds=[0.5, 0.6, 0.7], temperatures=[1.5, 1.0, 1.0, 1.0], calibration=RECORD)
TRIAL = {"num_images": 60, "accuracy": 0.51, "full_accuracy": 0.53, "cost": 0.61, "picture": "early_exit.png"}
TRIAL |= {"images_per_second": 812.4, "plain_images_per_second": 640.0, "batch_size": 20}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Save a model with the card of its training, and return its folder."""
    folder = tmp_path_factory.mktemp("trained") / "late"
    names = [*(f"exit_{exit}_accuracy" for exit in range(4)), "ensemble_accuracy"]
    facts = CardFacts(
        name="late",
        repository="late",
        dataset="d",
        num_eval_images=20,
        metrics={f"eval_{name}": 0.25 for name in names},
        recipe={"seed": 0, "layers": (1, 2), "schedule": object},
        base_model="owner/base",
        tags=["mine"],
        latency={"milliseconds": [1.0, 2.0, 3.0, 4.0], "runs": 10, "dtype": "float32", "device": "a processor"},
        versions={"torch": "1.0"},
        commit="abc",
        **method_facts(get_method("byot", alpha=0.5)),
    )
    model = build_copy(MultiExitForImageClassification, "test_resnet", num_labels=5, small_input_stem=True)
    model.save_pretrained(folder)
    write_model_card(model, folder, facts)
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    """Return a copy of the folder to change."""
    return Path(shutil.copytree(trained, tmp_path / "late"))


def calibrated(folder):
    model = MultiExitForImageClassification.from_pretrained(folder)
    model.config.exit_policy, model.config.early_exit = POLICY.to_dict(), True
    return model


def test_a_policy_found_later_enters_the_card_and_the_rest_stays(checkpoint):
    before = (checkpoint / "README.md").read_text()
    for _ in range(2):  # a second time changes nothing more
        update_model_card(calibrated(checkpoint), checkpoint, TRIAL)
        after = (checkpoint / "README.md").read_text()
        section = sections_of(after)["Early exit"]
        assert [row["threshold"] for row in table_of(section, "exit")] == ["0.5", "0.6", "0.7", "always"]
        for figure in ("60 held-out", "51.00%", "0.610", "53.00%", "batches of 20", "812 images/s", "640 images/s"):
            assert figure in section
        assert "(early_exit.png)" in section
        assert cited_by(after) == ["zhang2019be", "guo2017calibration", "angelopoulos2021learn"]
        assert sections_of(after).keys() == sections_of(before).keys()
        for title in ("Use", "Results", "Training"):
            assert sections_of(after)[title] == sections_of(before)[title]
        assert after.split("## Use")[0] == before.split("## Use")[0]
    update_model_card(calibrated(checkpoint), checkpoint)  # a policy that was not tried out
    assert "held-out" not in (checkpoint / "README.md").read_text()


@pytest.mark.slow
def test_an_edited_card_is_left_as_it_is(checkpoint):
    path = checkpoint / "README.md"
    ours = path.read_text()
    edited = ours.replace("## Training", "## Limitations\n\nBy hand.\n\n## Training")
    path.write_text(edited)
    for _ in range(2):
        with pytest.warns(UserWarning, match="README.md was edited, or not written by hf_selfkd.*README.new.md"):
            update_model_card(calibrated(checkpoint), checkpoint, TRIAL)
        assert path.read_text() == edited
    new = (checkpoint / "README.new.md").read_text()
    assert "60 held-out" in new and "By hand" not in new
    path.unlink()  # the facts are still there
    update_model_card(calibrated(checkpoint), checkpoint, TRIAL)
    assert path.read_text() == new


def test_writing_again_keeps_an_edited_card_too(build, checkpoint):
    path = checkpoint / "README.md"
    path.write_text(path.read_text() + "By hand.\n")
    with pytest.warns(UserWarning, match="README.new.md"):
        write_model_card(build(), checkpoint, CardFacts(name="new", repository="new"))
    assert path.read_text().endswith("By hand.\n")
    assert "# new" in (checkpoint / "README.new.md").read_text()


def test_a_card_from_elsewhere_is_left_as_it_is(build, tmp_path):
    model = build()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    model.config.exit_policy = POLICY.to_dict()
    with pytest.warns(UserWarning, match="README.new.md"):
        update_model_card(model, tmp_path)
    assert (tmp_path / "README.md").read_text().endswith("Mine.\n")
    assert "1,200 images" in (tmp_path / "README.new.md").read_text()


def test_a_folder_without_a_card_gets_one_with_its_policy(build, tmp_path):
    model = build()
    model.config.exit_policy = POLICY.to_dict()
    update_model_card(model, tmp_path / "new")
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert card.text.lstrip().startswith("# new\n")
    assert table_of(sections_of(card.text)["Early exit"], "exit")[1] == {
        "exit": "1",
        "threshold": "0.6",
        "temperature": "1",
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"facts": {"name": "a"}}', '{"facts": {"unknown": 1}}'])
def test_facts_that_cannot_be_read_are_refused(checkpoint, content):
    (checkpoint / "card_facts.json").write_text(content)
    before = (checkpoint / "README.md").read_text()
    with pytest.raises(ValueError, match="card_facts.json does not hold the facts of a model card"):
        update_model_card(calibrated(checkpoint), checkpoint)
    with pytest.warns(UserWarning, match="README.new.md"):  # a run that ends is not stopped by them
        write_model_card(calibrated(checkpoint), checkpoint, CardFacts(name="a", repository="a"))
    assert (checkpoint / "README.md").read_text() == before


def test_facts_are_plain_json(checkpoint):
    facts = json.loads((checkpoint / "card_facts.json").read_text(), parse_constant=pytest.fail)["facts"]
    assert facts["recipe"]["layers"] == [1, 2] and facts["hyper_parameters"] == {"alpha": 0.5}
