"""The example of a method of one's own, run as a user runs it."""

import ast
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "write_your_own_method.py"


def test_forty_lines_teach_every_exit(tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    process = subprocess.run([sys.executable, str(EXAMPLE)], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    accuracy = ast.literal_eval(process.stdout.splitlines()[-1])
    assert len(accuracy) == 6  # the deepest exit, each of the four, and their ensemble
    assert all(value > 0.9 for value in accuracy.values()), accuracy
