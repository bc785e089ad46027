"""README and docs: their Python runs and prints the output in its comments, and their figures are those measured."""

import ast
import contextlib
import io
import json
import re
import tokenize
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.helpers.hub_server import HubServer, connect
from tests.helpers.methods import METHODS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
DOCS = sorted((ROOT / "docs").glob("*.md"))
NUMBER = r"-?\d+(?:\.\d*)?(?:e-?\d+)?"


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def section(page: Path, title: str) -> str:
    """Return a section of a page without its code."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#+ |\Z)", text, flags=re.DOTALL | re.MULTILINE)[1]


def figures(text: str) -> list[str]:
    """Return the numbers of a text; those of link targets, code and names such as ResNet-50 are left out."""
    return re.findall(r"(?<!\w)\d+(?:[.,]\d+)*", re.sub(r"\]\(.*?\)|`.*?`|[A-Z]\w+-\d+", "", text))


# Snippets


def comment_of(snippet: str, node: ast.stmt) -> str:
    """Return the comment on the last line of a statement and those on the lines that follow."""
    tokens = list(tokenize.generate_tokens(io.StringIO(snippet).readline))
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    line = node.end_lineno
    if line not in comments:  # the output is on the lines below
        line += 1
    found = []
    while line in comments and (line == node.end_lineno or comments[line].line.startswith("#")):
        found.append(comments[line].string.lstrip("# "))
        line += 1
    return " ".join(found)


def run(page: Path, variables: dict) -> list[tuple[str, str]]:
    """Run a page's snippets in order; return, for each print, the comment that shows its output, and the output."""
    shown = []
    for snippet in blocks(page):
        for node in ast.parse(snippet).body:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(ast.Module([node], []), str(page), "exec"), variables)
            if ast.unparse(node).startswith("print("):
                shown.append((comment_of(snippet, node), printed.getvalue().strip()))
    return shown


def check(shown: list[tuple[str, str]]) -> None:
    """Compare words and integers exactly, other numbers within 0.05: they differ a little between machines."""
    for comment, printed in shown:
        assert re.sub(NUMBER, "0", comment) == re.sub(NUMBER, "0", printed)
        for expected, number in zip(re.findall(NUMBER, comment), re.findall(NUMBER, printed), strict=True):
            assert float(number) == pytest.approx(float(expected), abs=0.05 if "." in expected else 0)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Run the README in a folder of its own, with a stand-in for the Hub; return its variables and its output."""
    folder = tmp_path_factory.mktemp("reader")
    digit = torch.tensor(load_digits().images[-1])
    Image.fromarray((digit * 255 / 16).round().byte().numpy()).save(folder / "digit.png")
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        connect(patch, server, folder / "cache")
        patch.chdir(folder)
        torch.set_num_threads(1)
        variables = {"__name__": "readme"}
        yield variables, run(README, variables)


def test_the_readme_prints_what_it_shows(reader):
    _, shown = reader
    assert len(shown) >= 6
    check(shown)


def pages() -> list:
    """Return the pages with snippets; exporting to ONNX is slow."""
    found = [page for page in DOCS if blocks(page)]
    return [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem == "deploy")) for page in found]


@pytest.mark.parametrize("page", pages())
def test_a_page_prints_what_it_shows(reader, page):
    variables, _ = reader
    check(run(page, dict(variables)))


# Figures


def test_the_readme_is_short_and_lists_every_method():
    assert len(README.read_text().splitlines()) <= 200
    listed = re.findall(r"^\| `(\w+)` \|", section(README, "Methods"), flags=re.MULTILINE)
    assert sorted(listed) == METHODS


def accuracies(configuration: str, exit: str) -> list[str]:
    """Return mean and standard error in percent, as the tables give them."""
    runs = [json.loads(path.read_text()) for path in (RESULTS / "accuracy").glob(f"{configuration}-seed*.json")]
    assert {(run["train_images"], run["epochs"]) for run in runs} == {(10000, 8)} and len(runs) == 3
    values = [100 * run["accuracy"][exit] for run in runs]
    return [f"{mean(values):.2f}", f"{stdev(values) / len(values) ** 0.5:.2f}"]


def speed_ups() -> list[str]:
    rows = json.loads((RESULTS / "early_exit.json").read_text())["batch"]["rows"]
    ratios = {row["against"]: row["speed-up (wall)"] for row in rows if row["threads"] == 1}
    return [f"{ratios[name]:.2f}" for name in ("plain timm", "earlyon, batched call")]


def test_the_results_of_the_readme_are_what_was_measured():
    accuracy, early_exit, training = section(README, "Results").strip().splitlines()[2:]
    measured = [accuracies(name, "exit_3") for name in ("none", "eed", "deep_supervision")]
    assert figures(accuracy) == ["10,000", "8", "3", *sum(measured, [])]
    assert figures(early_exit) == ["9", "16", *speed_ups()]
    steps = json.loads((RESULTS / "training.json").read_text())["steps"]["rows"]
    ratios = [row["over its parts (cpu)"] for row in steps]
    assert figures(training) == [f"{min(ratios):.2f}", f"{max(ratios):.2f}"]


def test_the_coverage_of_the_readme_is_what_was_measured():
    measured = json.loads((RESULTS / "coverage.json").read_text())
    attached = [record for record in measured["meta"] if "reason" not in record]
    real = [record for record in measured["real"] if "skipped" not in record]
    exact = [sum(record["logits"] is True and record["maps"] is True for record in real)]
    exact += [sum(record[check] is True for record in real) for check in ("trains", "round_trip")]
    shrinks = sum(record["shrinks"] is True for record in real)
    numbers = [len(real), *exact, shrinks, len(real) - shrinks]
    names = [f"{len(attached):,}", f"{len(measured['meta']):,}", "1.0.31"]
    assert figures(section(README, "Any timm backbone")) == names + [str(number) for number in numbers]


@pytest.mark.parametrize("table", ["accuracy/table.md", "segmentation/table.md", "training.md"])
def test_the_tables_of_the_benchmarks_are_what_was_measured(table):
    first_table = next(part for part in (RESULTS / table).read_text().split("\n\n") if part.startswith("|"))
    lines = first_table.splitlines()
    assert len(lines) > 3
    assert set(lines) <= set(BENCHMARKS.read_text().splitlines())


def test_the_figures_in_the_text_are_what_was_measured():
    measured = json.loads((RESULTS / "training.json").read_text())
    formats = [f"{row['channels_last, bfloat16 (cpu)']:.2f}" for row in measured["formats"]["rows"]]
    loaders = [
        f"{row[f'over {loader} (wall)']:.2f}"
        for row in measured["pipeline"]["rows"]
        for loader in ("timm's", "timm's prefetcher")
    ]
    text = next(
        part for part in BENCHMARKS.read_text().split("\n\n") if part.startswith("bfloat16 with channels_last")
    )
    assert figures(text) == [*formats, "224", *loaders]
    teacher = json.loads((RESULTS / "accuracy" / "teacher-seed0.json").read_text())["accuracy"]["ensemble"]
    assert f"{100 * teacher:.2f}" in figures(section(BENCHMARKS, "Accuracy: `accuracy.py`"))


# Links


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, BENCHMARKS, *DOCS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\((.*?)\)", text) if not target.startswith("https://")]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", [README, BENCHMARKS, *DOCS], ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_of_commands_exist(page):
    scripts = re.findall(r"(?:examples|benchmarks)/[\w/]+\.(?:py|yaml)", page.read_text())
    assert [script for script in scripts if not (ROOT / script).exists()] == []
