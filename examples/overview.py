"""What a run is going to do, in one short block before its first step."""

from typing import Any

from hf_selfkd import SelfDistillationTrainer, exit_costs
from hf_selfkd.evaluation import to_table


def print_overview(trainer: SelfDistillationTrainer, images: dict[str, Any], recipe: str | None = None) -> None:
    """Print images, classes, splits, image size, learning rate, and where the exits sit and cost.

    Args:
        trainer: The trainer, before training.
        images: The splits ``train`` and ``test``.
        recipe: Name of the recipe that set the defaults.
    """
    model, args = trainer.network, trainer.args
    channels, height, width = model.config.pretrained_cfg["input_size"]
    lines = {
        "data": f"{_count(images['train'])} to train on, {_count(images['test'])} to evaluate on, "
        f"{model.config.num_labels} classes",
        "images": f"{height}x{width} pixels, {'grey' if channels == 1 else 'RGB'}",
        "recipe": f"{f'{recipe}: ' if recipe else ''}{args.num_train_epochs:g} epochs of batches of "
        f"{args.train_batch_size}, {args.optim.value}, learning rate {args.learning_rate:g}, {_schedule(trainer)}",
        "network": f"{model.config.backbone}, trained by {trainer.method.name}",
    }
    print("\n".join(f"{name:<8}{text}" for name, text in lines.items()))
    print(f"\n{to_table(_exits(model))}\n", flush=True)


def _count(rows: Any) -> str:
    name = f" ({rows.split})" if rows.split is not None else ""
    return f"{len(rows):,} images{name}" if hasattr(rows, "__len__") else f"a stream{name}"


def _schedule(trainer: SelfDistillationTrainer) -> str:
    """Describe how the learning rate changes, and the milestones that the run does not reach."""
    args, milestones = trainer.args, trainer.lr_milestones
    if not milestones:
        return f"schedule {args.lr_scheduler_type.value}"
    text = f"times {trainer.lr_gamma:g} after epochs {', '.join(f'{milestone:g}' for milestone in milestones)}"
    missed = [f"{milestone:g}" for milestone in milestones if milestone >= args.num_train_epochs]
    return text + (f" ({', '.join(missed)} not reached in this run)" if missed and args.max_steps <= 0 else "")


def _exits(model: Any) -> list[dict[str, Any]]:
    rows = [{"exit": exit, "after stage": stage} for exit, stage in enumerate(model.exit_stages)]
    rows.append({"exit": model.num_exits - 1, "after stage": "final"})
    if model.task != "image-classification":
        return rows
    costs = exit_costs(model)
    return [
        row | {"multiply-adds (M)": f"{cost / 1e6:.2f}", "share of the cost": f"{cost / costs[-1]:.3f}"}
        for row, cost in zip(rows, costs, strict=True)
    ]
