"""The README's Python runs as it stands, in order, as one reader would run it."""

import json
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from hf_selfkd import list_methods

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_snippets_run(tmp_path):
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    printed = ""
    for snippet in blocks("python"):
        process = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.strip()
        printed += process.stdout
    assert "'eval_accuracy_exit_0'" in printed
    assert "'score'" in printed


def test_every_method_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == set(list_methods())


def test_the_train_snippet_is_short():
    statements = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(statements) <= 16


def test_the_coverage_is_what_was_measured():
    measured = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "coverage.json").read_text())
    attached = [record for record in measured["meta"] if "reason" not in record]
    real = [record for record in measured["real"] if "skipped" not in record]
    assert f"Of the {len(measured['meta']):,} names of timm 1.0.31, {len(attached):,} get exits" in README
    text = " ".join(README.split())
    assert f"the smallest model of each of {len(real)} classes" in text
    for check in ("logits", "maps", "trains", "round_trip"):
        assert sum(record[check] is True for record in real) == 99, check
    assert f"Single images leave a running batch on {sum(record['shrinks'] is True for record in real)};" in text
