"""Calibrate when images may leave a trained checkpoint early, and save that with it.

    python examples/early_exit.py --checkpoint runs/eed --dataset cifar100 --target_cost 0.6
    python examples/early_exit.py --checkpoint runs/digits --dataset digits --max_risk 0.02

Half of the evaluation split calibrates, the other half judges. Afterwards `pipeline("image-classification")` and
`AutoModelForImageClassification` on the checkpoint leave early by themselves. The tables are printed; they and the
curve go into the checkpoint's folder as early_exit.json and early_exit.png, and its model card tells of the policy.
`--push_to_hub` uploads the folder.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from data import DataArguments, LabelledImages, load_images
from huggingface_hub import create_branch, create_repo, upload_folder
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForImageClassification

import hf_selfkd
from hf_selfkd.evaluation.costs import measure_throughput
from hf_selfkd.evaluation.curves import anytime_curve, budgeted_curve, collect_logits, plot_curves, to_table
from hf_selfkd.model_card.card import update_model_card


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="Folder of a multi-exit checkpoint.")
    parser.add_argument("--dataset", default="cifar100", help="As for train_cifar.py.")
    parser.add_argument("--max_eval_samples", type=int, help="Use the first so many images only.")
    parser.add_argument("--criterion", default="confidence", help="confidence, entropy, margin or patience.")
    parser.add_argument("--delta", type=float, default=0.05, help="Chance with which the guarantee may fail.")
    demand = parser.add_mutually_exclusive_group(required=True)
    demand.add_argument("--target_cost", type=float, help="Share of the full cost: best accuracy within it.")
    demand.add_argument("--max_accuracy_drop", type=float, help="Accuracy that may be lost: least cost for it.")
    demand.add_argument("--max_risk", type=float, help="The same as a guarantee for images to come.")
    parser.add_argument("--push_to_hub", action="store_true", help="Upload the checkpoint afterwards.")
    parser.add_argument("--hub_model_id", help="Repository to upload to. Default: the folder's name.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make the repository private if it is new.")
    parser.add_argument("--hub_revision", help="Branch to upload to. Default: main.")
    return parser.parse_args()


def push(options: argparse.Namespace) -> None:
    """Upload the folder as train_cifar.py does, checkpoints and training_args.bin left out."""
    name = options.hub_model_id or options.checkpoint.resolve().name
    repository = create_repo(name, private=options.hub_private_repo or None, exist_ok=True).repo_id
    if options.hub_revision is not None:
        create_branch(repository, branch=options.hub_revision, exist_ok=True)
    upload_folder(
        repo_id=repository,
        folder_path=options.checkpoint,
        revision=options.hub_revision,
        commit_message="Leave early",
        ignore_patterns=["_*", "checkpoint-*", "*.bin"],
    )
    print(f"Pushed to {repository}")


def main():
    options = parse()
    model = AutoModelForImageClassification.from_pretrained(options.checkpoint).eval()
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.config.pretrained_cfg))
    data = DataArguments(dataset=options.dataset, max_eval_samples=options.max_eval_samples)
    images = LabelledImages(load_images(data)[0]["test"], transform)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    halves = [Subset(images, order[::2]), Subset(images, order[1::2])]
    given, kept = (collect_logits(model, DataLoader(half, batch_size=100)) for half in halves)

    costs = hf_selfkd.exit_costs(model)
    demand = {name: getattr(options, name) for name in ("target_cost", "max_accuracy_drop", "max_risk")}
    policy = hf_selfkd.calibrate(*given, costs, **demand, delta=options.delta, criterion=options.criterion)
    exit_index, logits = policy.decide(kept[0])
    batch = torch.stack([halves[1][index]["pixel_values"] for index in range(min(64, len(halves[1])))])
    metric = hf_selfkd.MultiExitAccuracy(keep_in_memory=True)
    scores = metric.compute(predictions=kept[0].transpose(0, 1), references=kept[1])
    result = {
        "policy": policy.to_dict(),
        "accuracy": (logits.argmax(dim=1) == kept[1]).double().mean().item(),
        "cost": sum(costs[exit] for exit in exit_index.tolist()) / len(exit_index) / costs[-1],
        "throughput": measure_throughput(model, batch.to(model.device), policy, costs),
        "exits": [
            row | {"calibration error": scores[f"calibration_error_exit_{row['exit']}"]}
            for row in anytime_curve(*kept, costs)
        ],
        "budgets": budgeted_curve(*given, costs, *kept, criterion=options.criterion),
    }
    for title in ("exits", "budgets"):
        print(f"\n{title}\n{to_table(result[title])}")
    print(f"\nthe policy: accuracy {result['accuracy']:.4f} at {result['cost']:.3f} of the full cost")
    print(to_table([result["throughput"]]))

    model.config.exit_policy, model.config.early_exit = policy.to_dict(), True
    model.config.save_pretrained(options.checkpoint)
    (options.checkpoint / "early_exit.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_curves(
        {"single exits": result["exits"], "early exit": result["budgets"]}, options.checkpoint / "early_exit.png"
    )
    trial = {"num_images": len(kept[1]), "accuracy": result["accuracy"], "cost": result["cost"]}
    trial |= {"full_accuracy": result["exits"][-1]["accuracy"], "picture": "early_exit.png"}
    trial |= result["throughput"] | {"batch_size": len(batch)}
    update_model_card(model, options.checkpoint, trial)
    print(f"\nSaved to {options.checkpoint}")
    if options.push_to_hub:
        push(options)


if __name__ == "__main__":
    main()
