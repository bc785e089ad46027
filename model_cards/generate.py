"""Train the reference checkpoints with the examples, as a user would, and keep their model cards.

    python model_cards/generate.py                     # digits, a minute on one core
    python model_cards/generate.py --cifar10 cifar10   # CIFAR-10 too, from the Hub or a local folder; some minutes
    python model_cards/generate.py --render            # no training: the present template, filled from stored facts

Each folder has what a checkpoint has on the Hub, without weights and code: the card, its pictures, the facts that it
was rendered from, and the configuration.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hf_selfkd import MultiExitConfig, MultiExitForImageClassification
from hf_selfkd.model_card import write_model_card
from hf_selfkd.model_card.storage import load_facts

ROOT = Path(__file__).parents[1]
FILES = ["README.md", "card_facts.json", "config.json"]
DIGITS = ["--dataset", "digits", "--preset", "smoke"]
CIFAR10 = ["--method", "byot", "--backbone_kwargs", '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}']
CIFAR10 += ["--max_train_samples", "10000", "--num_train_epochs", "10", "--lr_milestones", "5", "8", "9"]
CIFAR10 += ["--bf16", "true", "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"]
CIFAR10 += ["--use_cpu", str(not torch.accelerator.is_available()).lower()]


def train(checkpoint: Path, dataset: str, training: list[str], constraint: list[str]) -> None:
    """Train, then calibrate the exit policy."""
    run("train_cifar.py", *training, "--output_dir", str(checkpoint))
    run("early_exit.py", "--checkpoint", str(checkpoint), "--dataset", dataset, *constraint)


def keep_card(checkpoint: Path) -> None:
    """Copy the card of a checkpoint, and everything it was rendered from, into the folder of its name."""
    target = ROOT / "model_cards" / checkpoint.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in [*(checkpoint / name for name in FILES), *checkpoint.glob("*.png")]:
        shutil.copy(path, target)


def run(example: str, *options: str) -> None:
    """Run an example from the root of the repository, so that the card gives its commit."""
    subprocess.run([sys.executable, str(ROOT / "examples" / example), *options], cwd=ROOT, check=True)


def render() -> None:
    """Render all cards again from their stored facts."""
    for path in (ROOT / "model_cards").glob("*/card_facts.json"):
        model = MultiExitForImageClassification(MultiExitConfig.from_pretrained(path.parent))
        write_model_card(model, path.parent, load_facts(path.parent))


def main() -> None:
    """Generate the cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", help="cifar10 for the Hub, or a local folder of it; without it digits only")
    parser.add_argument("--render", action="store_true", help="render the cards again, without training")
    options = parser.parse_args()
    if options.render:
        return render()
    dataset = options.cifar10
    with tempfile.TemporaryDirectory() as work:
        checkpoints = [Path(work) / "digits"]
        train(checkpoints[0], "digits", DIGITS, ["--max_accuracy_drop", "0.01"])
        if dataset is not None:
            checkpoints.append(Path(work) / "cifar10-small")
            train(checkpoints[1], dataset, ["--dataset", dataset, *CIFAR10], ["--max_risk", "0.02"])
        for checkpoint in checkpoints:  # not before all are trained: a card reports uncommitted changes
            keep_card(checkpoint)


if __name__ == "__main__":
    main()
