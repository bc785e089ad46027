"""Record the results of the library bit by bit, and compare them after a change that should not affect them.

    python benchmarks/unchanged.py record runs/before     # before the change
    python benchmarks/unchanged.py compare runs/before    # after it

For every method and both tasks: the losses and terms of ten steps, the tensors of a checkpoint, the metrics of an
evaluation; of one trained classifier the exits and logits of `early_exit` under every criterion and what `calibrate`
finds. Checkpoints that were recorded in the middle of a run are resumed, and must end with the recorded weights.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainingArguments

from hf_selfkd import (
    MultiExitForImageClassification,
    MultiExitForSemanticSegmentation,
    SelfDistillationTrainer,
    calibrate,
    exit_costs,
    get_method,
)

SEGMENTATION = ("none", "deep_supervision", "frskd", "frskd_ramp")
CLASSIFICATION = (
    *("none", "deep_supervision", "byot", "eed", "frskd", "lsh", "okd_mde", "kd", "eed+lsh", "okd_mde+lsh"),
    *("lsh_teacher", "byot_vit", "okd_mde_vit", "frskd_vit"),
)
STEPS, MIDDLE = 10, 6
# Log entries that depend on the machine or the time, not on the computation.
CLOCK = ("runtime", "per_second", "flos")


def digest(tensor: torch.Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    values = tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]}"


def digests(path: Path) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in sorted(load_file(path).items())}


def method_of(name: str):
    torch.manual_seed(1)
    if name in ("kd", "lsh_teacher"):
        teacher = MultiExitForImageClassification.from_backbone("test_resnet", num_labels=5, exits=[])
        return get_method(name.partition("_")[0], teacher=teacher)
    if name == "frskd_ramp":
        return get_method("frskd", ramp_start=0, ramp_end=3)
    return get_method(name.removesuffix("_vit"))


def classifier(backbone: str = "test_resnet") -> MultiExitForImageClassification:
    torch.manual_seed(0)
    options = {} if backbone == "test_resnet" else {"backbone_kwargs": {"img_size": 32, "patch_size": 8}}
    stem = backbone == "test_resnet"
    return MultiExitForImageClassification.from_backbone(backbone, num_labels=5, small_input_stem=stem, **options)


def segmenter() -> MultiExitForSemanticSegmentation:
    torch.manual_seed(0)
    return MultiExitForSemanticSegmentation.from_backbone("test_resnet", num_labels=5, pyramid_width=8)


def images(maps: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(40):
        image = torch.randn(3, 32, 32, generator=generator) + index % 5 - 2
        label = torch.randint(0, 5, (32, 32), generator=generator) if maps else index % 5
        if maps:
            image, label[:4] = torch.nn.functional.interpolate(image[None], size=64)[0], 255
            label = torch.nn.functional.interpolate(label[None, None].float(), size=64)[0, 0].long()
        samples.append({"pixel_values": image, "labels": label})
    return samples


def trainer_of(task: str, method: str, folder: Path) -> SelfDistillationTrainer:
    model = (
        segmenter() if task == "segmentation" else classifier("test_vit" if method.endswith("_vit") else "test_resnet")
    )
    data = images(task == "segmentation")
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_steps=MIDDLE,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    options = {"ema_decay": 0.9} if method in ("byot", "frskd") else {}
    return SelfDistillationTrainer(
        model, args, method_of(method), train_dataset=data, eval_dataset=data[:20], **options
    )


def numbers(entry: dict) -> dict[str, str]:
    return {
        name: repr(value)
        for name, value in sorted(entry.items())
        if isinstance(value, (int, float)) and not name.endswith(CLOCK) and "flos" not in name
    }


def run(task: str, method: str, folder: Path) -> dict:
    trainer = trainer_of(task, method, folder)
    trainer.train()
    found = {"log": [numbers(entry) for entry in trainer.state.log_history]}
    found["metrics"] = numbers(trainer.evaluate())
    checkpoint = folder / f"checkpoint-{MIDDLE}"
    for path in sorted(checkpoint.glob("*.safetensors")):
        if not path.name.startswith("process_"):
            found[path.name] = digests(path)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    found["optimizer"] = {
        f"{key}.{name}": digest(value)
        for key, state in sorted(optimizer["state"].items())
        for name, value in sorted(state.items())
    }
    trainer.save_model(str(folder / "final"))
    found["final"] = digests(folder / "final" / "model.safetensors")
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    return found


def resume(task: str, method: str, folder: Path, copy: Path) -> dict:
    """Resume a recorded checkpoint in another folder, and return the digests of its final weights."""
    shutil.copytree(folder / f"checkpoint-{MIDDLE}", copy / f"checkpoint-{MIDDLE}")
    trainer = trainer_of(task, method, copy)
    trainer.train(resume_from_checkpoint=str(copy / f"checkpoint-{MIDDLE}"))
    trainer.save_model(str(copy / "final"))
    log = [numbers(entry) for entry in trainer.state.log_history]
    return {"final": digests(copy / "final" / "model.safetensors"), "log": log[:-1]}  # the last times the run


def exits_of(folder: Path) -> dict:
    found = {}
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(64, 3, 32, 32, generator=generator) + torch.arange(64).view(-1, 1, 1, 1) % 5 - 2
    labels = torch.arange(64) % 5
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    costs = exit_costs(model)
    found["costs"] = [repr(cost) for cost in costs]
    with torch.no_grad():
        exit_logits = torch.stack(model(pixels).exit_logits)
    found["exit_logits"] = digest(exit_logits)
    constraints = [{"target_cost": 0.8}, {"max_accuracy_drop": 0.1}, {"max_risk": 0.3, "delta": 0.2}]
    for criterion in ("confidence", "entropy", "margin", "patience"):
        for constraint in constraints:
            for judge in (labels, None):
                name = f"{criterion} {constraint} {'labels' if judge is not None else 'final exit'}"
                policy = calibrate(exit_logits, judge, costs, criterion=criterion, **constraint)
                found[f"calibrate {name}"] = [repr(policy.thresholds), repr(policy.temperatures)]
                output = model.early_exit(pixels, policy)
                found[f"early_exit {name}"] = [digest(value) for value in output.values()]
    return found


def collect(folder: Path) -> dict:
    found = {}
    for task, methods in (("classification", CLASSIFICATION), ("segmentation", SEGMENTATION)):
        for method in methods:
            print(task, method, flush=True)
            found[f"{task} {method}"] = run(task, method, folder / task / method)
    for method in ("byot", "byot_vit"):
        found[f"exits {method}"] = exits_of(folder / "classification" / method / "final")
    return found


def differences(before, after, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(before.keys() | after.keys())
        return [line for name in names for line in differences(before.get(name), after.get(name), f"{path}/{name}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{path}/{index}")]
    return [] if before == after else [f"{path}: {before} -> {after}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if options.action == "record":
        options.folder.mkdir(parents=True)
        found = collect(options.folder / "runs")
        (options.folder / "found.json").write_text(json.dumps(found, indent=1))
        return 0
    before = json.loads((options.folder / "found.json").read_text())
    other = options.folder / "compared"
    shutil.rmtree(other, ignore_errors=True)
    lines = differences(before, collect(other / "runs"))
    for key in before:
        task, method = key.split()
        if task == "exits":
            saved = options.folder / "runs" / "classification" / method / "final"
            lines += differences(before[key], exits_of(saved), f"/saved before/{method}")
        else:
            after = resume(task, method, options.folder / "runs" / task / method, other / "resumed" / task / method)
            expected = {"final": before[key]["final"], "log": before[key]["log"][:-1]}
            lines += differences(expected, after, f"/resumed {key}")
    print("\n".join(lines[:100]) or f"Nothing changed: {sum(map(len, before.values()))} records are the same.")
    print(f"{len(lines)} differences")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
