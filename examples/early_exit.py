"""Calibrate early exit for a trained checkpoint, and save the policy in it.

    python examples/early_exit.py --checkpoint runs/eed --dataset cifar100 --target_cost 0.6
    python examples/early_exit.py --checkpoint runs/digits --dataset digits --max_risk 0.02

One half of the evaluation split calibrates, the other half tests; with `--eval_share` as in training, of the images
that were held out. Afterwards `pipeline("image-classification")` and
`AutoModelForImageClassification` exit early with the checkpoint. Tables are printed; they and the curve are saved in
the checkpoint's folder as early_exit.json and early_exit.png, and its model card describes the policy.
`--push_to_hub` uploads the folder.
"""

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import timm
import torch
from data import DataArguments, EvaluationArguments, LabelledImages, load_images
from huggingface_hub import create_branch, create_repo, upload_folder
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForImageClassification, HfArgumentParser

import hf_selfkd
from hf_selfkd.evaluation import (
    anytime_curve,
    budgeted_curve,
    collect_logits,
    measure_throughput,
    plot_curves,
    to_table,
)
from hf_selfkd.model_card import update_model_card
from hf_selfkd.models.criteria import CRITERIA

# A calibration set is called small where the standard error of the accuracy on it exceeds this.
LARGE_ERROR = 0.01


@dataclass
class CalibrationData(EvaluationArguments):
    """Options of the dataset, which are those of train_cifar.py."""

    dataset: str = field(default="cifar100", metadata={"help": "As for train_cifar.py."})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = HfArgumentParser(CalibrationData, description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="Folder of a multi-exit checkpoint.")
    parser.add_argument("--criterion", default="confidence", choices=list(CRITERIA), help="Score that images exit by.")
    parser.add_argument("--delta", type=float, default=0.05, help="Probability that the guarantee fails.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--target_cost", type=float, help="Share of the full cost: best accuracy within it.")
    target.add_argument("--max_accuracy_drop", type=float, help="Accuracy that may be lost: lowest cost within it.")
    target.add_argument("--max_risk", type=float, help="The same as a guarantee on unseen images.")
    parser.add_argument("--push_to_hub", action="store_true", help="Upload the checkpoint afterwards.")
    parser.add_argument("--hub_model_id", help="Repository to upload to. Default: the folder's name.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make the repository private if it is new.")
    parser.add_argument("--hub_revision", help="Branch to upload to. Default: main.")
    return parser.parse_args(argv)


def push(options: argparse.Namespace) -> None:
    """Upload the folder as train_cifar.py does, without checkpoints and training_args.bin."""
    name = options.hub_model_id or options.checkpoint.resolve().name
    repository = create_repo(name, private=options.hub_private_repo or None, exist_ok=True).repo_id
    if options.hub_revision is not None:
        create_branch(repository, branch=options.hub_revision, exist_ok=True)
    upload_folder(
        repo_id=repository,
        folder_path=options.checkpoint,
        revision=options.hub_revision,
        commit_message="Add an exit policy",
        ignore_patterns=["_*", "checkpoint-*", "*.bin"],
    )
    print(f"Pushed to {repository}")


def collect_halves(model, options: argparse.Namespace):
    """Return logits and labels of both halves of the evaluation split, and a batch of images of the second."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.config.pretrained_cfg))
    data = DataArguments(**{option.name: getattr(options, option.name) for option in fields(CalibrationData)})
    images = LabelledImages(load_images(data)[0]["test"], transform)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    halves = [Subset(images, order[::2]), Subset(images, order[1::2])]
    calibration, test = (collect_logits(model, DataLoader(half, batch_size=100)) for half in halves)
    batch = torch.stack([halves[1][index]["pixel_values"] for index in range(min(64, len(halves[1])))])
    return calibration, test, batch.to(model.device)


def warnings_of(throughput: dict[str, float], logits: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """Return what speaks against using the policy.

    Args:
        throughput: Return value of ``measure_throughput``.
        logits: Logits that it was calibrated on, ``(exits, images, classes)``.
        labels: Their labels.
    """
    accuracy = (logits[-1].argmax(dim=1) == labels).double().mean().item()
    error = (accuracy * (1 - accuracy) / len(labels)) ** 0.5
    found = []
    if error > LARGE_ERROR:
        found.append(
            f"{len(labels)} images are a small calibration set: an accuracy on them has a standard error of "
            f"{100 * error:.1f} points, so expect the policy to differ on other images. Calibrate on more."
        )
    if throughput["realised_speedup"] < 1:
        found.append(
            "On this device the policy makes the network slower: {images_per_second:.0f} images/s, vs. "
            "{plain_images_per_second:.0f} of the backbone without exits. Allow a lower cost or a larger loss of "
            "accuracy, train with fewer exits, or set early_exit to false in config.json.".format(**throughput)
        )
    return found


def exit_curve(logits: torch.Tensor, labels: torch.Tensor, costs: list[int]) -> list[dict[str, float]]:
    """Return a row per exit: cost, share, accuracy and calibration error."""
    metric = hf_selfkd.MultiExitAccuracy(keep_in_memory=True)
    scores = metric.compute(predictions=logits.transpose(0, 1), references=labels)
    return [
        row | {"calibration error": scores[f"exit_{row['exit']}_calibration_error"]}
        for row in anytime_curve(logits, labels, costs)
    ]


def main(argv: list[str] | None = None):
    options = parse(argv)
    model = AutoModelForImageClassification.from_pretrained(options.checkpoint).eval()
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    calibration, test, batch = collect_halves(model, options)

    costs = hf_selfkd.exit_costs(model)
    target = {name: getattr(options, name) for name in ("target_cost", "max_accuracy_drop", "max_risk")}
    policy = hf_selfkd.calibrate(*calibration, costs, **target, delta=options.delta, criterion=options.criterion)
    exit_index, logits = policy.decide(test[0])
    result = {
        "policy": policy.to_dict(),
        "accuracy": (logits.argmax(dim=1) == test[1]).double().mean().item(),
        "cost": sum(costs[exit] for exit in exit_index.tolist()) / len(exit_index) / costs[-1],
        "throughput": measure_throughput(model, batch, policy, costs),
        "exits": exit_curve(*test, costs),
        "budgets": budgeted_curve(*calibration, costs, *test, criterion=options.criterion),
    }
    for title in ("exits", "budgets"):
        print(f"\n{title}\n{to_table(result[title])}")
    print(f"\nthe policy: accuracy {result['accuracy']:.4f} at {result['cost']:.3f} of the full cost")
    print(to_table([result["throughput"]]))
    for warning in warnings_of(result["throughput"], *calibration):
        print(f"\nWarning: {warning}")
    save(model, options.checkpoint, result, num_images=len(test[1]), batch_size=len(batch))
    if options.push_to_hub:
        push(options)


def save(model, folder: Path, result: dict, num_images: int, batch_size: int) -> None:
    """Save policy, tables and curve in the checkpoint's folder, and update its card."""
    model.config.exit_policy, model.config.early_exit = result["policy"], True
    model.config.save_pretrained(folder)
    (folder / "early_exit.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_curves({"single exits": result["exits"], "early exit": result["budgets"]}, folder / "early_exit.png")
    trial = {"num_images": num_images, "accuracy": result["accuracy"], "cost": result["cost"]}
    trial |= {"full_accuracy": result["exits"][-1]["accuracy"], "picture": "early_exit.png"}
    trial |= result["throughput"] | {"batch_size": batch_size}
    update_model_card(model, folder, trial)
    print(f"\nSaved to {folder}")


if __name__ == "__main__":
    main()
