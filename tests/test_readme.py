"""The README's Python runs as it stands, in order, as one reader would run it."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_selfkd import list_methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_snippets_run(hub, tmp_path):
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    printed = []
    for index, snippet in enumerate(blocks("python")):
        if "trust_remote_code" in snippet and "import hf_selfkd" not in snippet:  # as those run it who have it not
            snippet = f"import sys; sys.modules['hf_selfkd'] = None\n{snippet}"
        environment = hub.environment(tmp_path / f"home{index}")
        command = [sys.executable, "-c", snippet]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.strip()
        printed.append(process.stdout)
    assert "'eval_accuracy_exit_0'" in printed[0]
    assert "'score'" in printed[1]
    here, there = (ast.literal_eval(printed[index])[0] for index in (1, 4))  # from the Hub, without this library
    assert there == {"label": here["label"], "score": pytest.approx(here["score"], abs=1e-5)}
    assert hub.repositories["ada/digits"].private


def test_every_method_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == set(list_methods())


def test_the_train_snippet_is_short():
    statements = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(statements) <= 16


def test_the_coverage_is_what_was_measured():
    measured = json.loads((RESULTS / "coverage.json").read_text())
    attached = [record for record in measured["meta"] if "reason" not in record]
    real = [record for record in measured["real"] if "skipped" not in record]
    assert f"Of the {len(measured['meta']):,} names of timm 1.0.31, {len(attached):,} get exits" in README
    text = " ".join(README.split())
    assert f"the smallest model of each of {len(real)} classes" in text
    for check in ("logits", "maps", "trains", "round_trip"):
        assert sum(record[check] is True for record in real) == 99, check
    assert f"Single images leave a running batch on {sum(record['shrinks'] is True for record in real)};" in text


def test_tables_are_what_was_measured():
    for table in ("accuracy/table.md", "segmentation/table.md"):
        for line in (RESULTS / table).read_text().splitlines():
            assert line in README, table
    _, found, summary = (RESULTS / "training.md").read_text().partition("## Summary\n\n")
    assert found
    for line in summary.partition("\n\n")[0].splitlines():
        assert line in README
    measured = json.loads((RESULTS / "training.json").read_text())
    formats = [f"{row['channels_last, bfloat16 (cpu)']:.2f}" for row in measured["formats"]["rows"]]
    loaders = [
        [f"{row[f'over {loader} (wall)']:.2f}" for row in measured["pipeline"]["rows"]]
        for loader in ("timm's", "timm's prefetcher")
    ]
    text = " ".join(README.split())
    assert f"takes {' / '.join(formats)} of the time of float32" in text
    assert f"Two workers need {loaders[0][0]} times as long as timm's loader" in text
    assert (
        f"{loaders[0][1]} times for CIFAR-10, and {' and '.join(loaders[1])} times as long as its prefetcher" in text
    )
    rows = json.loads((RESULTS / "early_exit.json").read_text())["batch"]["rows"]
    speed_up = {row["against"]: row["speed-up (wall)"] for row in rows if row["threads"] == 1}
    assert (
        f"{speed_up['plain timm']:.2f} times as fast as plain timm and "
        f"{speed_up['earlyon, batched call']:.2f} times as fast as `earlyon`'s batched call"
    ) in text
    teacher = json.loads((RESULTS / "accuracy" / "teacher-seed0.json").read_text())["accuracy"]["ensemble"]
    assert f"a deeper network ({100 * teacher:.2f} % by itself)" in text
