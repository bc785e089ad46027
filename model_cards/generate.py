"""Train the reference checkpoints with the examples, as a user would, and keep the model cards that they get.

    python model_cards/generate.py                     # digits, a minute on one core
    python model_cards/generate.py --cifar10 cifar10   # CIFAR-10 too, from the Hub or a local folder; some minutes

Every folder here is what the Hub would show of a checkpoint: `README.md` and its pictures.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from accuracy import NETWORK, recipe  # noqa: E402

DIGITS = ["--dataset", "digits", "--preset", "smoke"]


def cifar10(dataset: str) -> list[str]:
    """Return the options for the network and the recipe of the accuracy benchmark, with fewer epochs."""
    arguments = argparse.Namespace(dataset=dataset, train_images=10000, epochs=10)
    return [*recipe(arguments), "--method", "byot", "--backbone_kwargs", json.dumps(NETWORK)]


def train(checkpoint: Path, dataset: str, training: list[str], demand: list[str]) -> None:
    """Train, then calibrate when images leave early."""
    run("train_cifar.py", *training, "--output_dir", str(checkpoint))
    run("early_exit.py", "--checkpoint", str(checkpoint), "--dataset", dataset, *demand)


def keep_card(checkpoint: Path) -> None:
    """Copy card and pictures of a checkpoint into the folder of its name."""
    target = ROOT / "model_cards" / checkpoint.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in [checkpoint / "README.md", *checkpoint.glob("*.png")]:
        shutil.copy(path, target)


def run(example: str, *options: str) -> None:
    """Run an example from the root of the repository, whose commit the card then names."""
    subprocess.run([sys.executable, str(ROOT / "examples" / example), *options], cwd=ROOT, check=True)


def main() -> None:
    """Generate the cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", help="cifar10 for the Hub, or a local folder of it; without it digits only")
    dataset = parser.parse_args().cifar10
    with tempfile.TemporaryDirectory() as work:
        checkpoints = [Path(work) / "digits"]
        train(checkpoints[0], "digits", DIGITS, ["--max_accuracy_drop", "0.01"])
        if dataset is not None:
            checkpoints.append(Path(work) / "cifar10-small")
            train(checkpoints[1], dataset, cifar10(dataset), ["--max_risk", "0.02"])
        for checkpoint in checkpoints:  # after all were trained: each card says whether files differ from the commit
            keep_card(checkpoint)


if __name__ == "__main__":
    main()
