"""The README's Python runs as it stands, in order, as one reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

from hf_selfkd import list_methods

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_snippets_run(tmp_path):
    for snippet in blocks("python"):
        process = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.strip()
    assert "'score'" in process.stdout


def test_every_method_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == set(list_methods())


def test_the_train_snippet_is_short():
    statements = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(statements) <= 16
