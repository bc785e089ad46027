"""Every example starts as a script, with no other module imported before."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow  # test_train_cifar.py runs one of them in full
@pytest.mark.parametrize("name", ["early_exit", "train_cifar", "train_imagenet", "train_segmentation"])
def test_options_are_listed(name):
    process = subprocess.run([sys.executable, EXAMPLES / f"{name}.py", "--help"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "--dataset" in process.stdout
