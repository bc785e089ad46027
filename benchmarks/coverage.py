"""Measure what "any timm backbone" means: all names on the meta device, the smallest of each class with real tensors.

Writes coverage.json and coverage.md. Results are appended to coverage.jsonl name by name, and what is there is not run
again:

    python benchmarks/coverage.py --output benchmarks/results
"""

import argparse
import gc
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from coverage_cuts import cut
from coverage_report import summary
from torch import Tensor, nn

from hf_selfkd import MultiExitConfig, MultiExitForImageClassification
from hf_selfkd.functional import add, cross_entropy
from hf_selfkd.models.hooks import Collector, Visitor, keep_rows, run

CLASSES = 10
MAX_PARAMETERS = 120e6
SIZE = (96, 128)  # of the images with real tensors, where the backbone takes it
SIZES = [(32, 32), (224, 448)]


def attach(name: str) -> dict[str, Any]:
    """Build a multi-exit model on the meta device, which runs the backbone there, and run its exits."""
    states = _random_states()
    with torch.device("meta"), torch.no_grad():
        model = MultiExitForImageClassification(MultiExitConfig(backbone=name, num_labels=CLASSES)).eval()
        for head, index in zip(model.exits, model.exit_stages, strict=True):
            stage = model.anatomy.stages[index]
            logits, features = head(torch.empty(2, stage.channels, *stage.size))
            if logits.shape != (2, CLASSES) or features.shape != (2, model.anatomy.width):
                raise RuntimeError(f"an exit gives {tuple(logits.shape)} and {tuple(features.shape)}")
    return {
        "class": type(model.backbone).__name__,
        "parameters": sum(parameter.numel() for parameter in model.backbone.parameters()),
        "hooks": model.anatomy.hooked,
        "in_order": model.anatomy.in_order,
        "layouts": sorted({stage.layout for stage in model.anatomy.stages}),
        "stages": len(model.anatomy.stages),
        "exits": model.exit_stages,
        "random_states_kept": states == _random_states(),
    }


def examine(name: str) -> dict[str, Any]:
    """Check a multi-exit model with real tensors against plain timm with the same weights."""
    torch.manual_seed(0)
    model = MultiExitForImageClassification.from_backbone(name, num_labels=CLASSES)
    plain = timm.create_model(name, num_classes=CLASSES)
    with torch.no_grad():
        for parameter in plain.parameters():  # some classifiers start at zero: all images would look alike
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = _images(plain.eval())
    _settle(plain, images)
    model.backbone.load_state_dict(plain.state_dict())
    results: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "image": list(images.shape[1:]),
    }
    model.eval(), plain.eval()
    with torch.no_grad():
        output = model(images, output_hidden_states=True)
        results["logits"] = _same([output.logits], [plain(images)])
        results["maps"] = _same(output.exit_maps, plain.forward_intermediates(images, intermediates_only=True))
        results["features"] = _check(_features, plain, images, output)
        results["shrinks"] = _check(_shrinks, model, images)
        results["round_trip"] = _check(_round_trip, model, images)
        results["sizes"] = _check(_sizes, name, plain)
        results["channels"] = _check(_channels, name)
    results["trains"], results["without_gradient_in_timm"] = _trains(model, plain, images)
    results["checkpointing"] = _check(_checkpointing, model, images)
    return results


@torch.no_grad()
def _settle(plain: nn.Module, images: Tensor) -> None:
    """Set the statistics of batch norms from the images: without, signals die out on their way and all look alike."""
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    plain.train()(images)


def _features(plain: nn.Module, images: Tensor, output: Any) -> str | bool:
    pre_logits = plain.forward_head(plain.forward_features(images), pre_logits=True)
    same = _same([output.exit_features[-1]], [pre_logits.flatten(1)])
    classifier = plain.get_classifier()
    if same is not True and isinstance(classifier, nn.Linear):  # a norm of the head may lie between (shvit)
        return _same([classifier(output.exit_features[-1])], [output.logits])
    return same


class _KeepRows(Visitor):
    """Keeps some rows of a stage's output."""

    def __init__(self, stage: int, rows: Tensor, batch_size: int):
        self.stage, self.rows, self.batch_size = stage, rows, batch_size

    def on_stage(self, index: int, output: Any) -> Any:
        return keep_rows(output, self.rows, self.batch_size) if index == self.stage else None


def _shrinks(model: MultiExitForImageClassification, images: Tensor) -> str | bool:
    if not model.anatomy.hooked:
        return "only forward_intermediates gives its stages"
    rows = torch.tensor([0, 2])
    full = run(model.backbone, model.anatomy, images, Visitor())
    if (full[0] - full[2]).abs().max() < 1e-4 * full.abs().max():
        return "undecided: all images have the same logits"
    for exit_stage in model.exit_stages:
        try:
            few = run(model.backbone, model.anatomy, images, _KeepRows(exit_stage, rows, len(images)))
        except RuntimeError as error:
            return f"stage {exit_stage}: {_first_line(error)}"
        same = _same([few], [full[rows]], exact=False)
        if same is not True:
            return f"stage {exit_stage}: {same}"
    return True


def _sizes(name: str, plain: nn.Module) -> str | bool:
    sizes = []
    for size in SIZES:
        kwargs = {"img_size": size} if plain.pretrained_cfg.get("fixed_input_size") else {}
        with torch.device("meta"):
            images = torch.empty(2, 3, *size)
            try:
                backbone = timm.create_model(name, num_classes=CLASSES, **kwargs).eval()
                backbone(images)
                maps = backbone.forward_intermediates(images, intermediates_only=True)
            except Exception:  # timm itself does not take this size
                continue
            config = MultiExitConfig(backbone=name, num_labels=CLASSES, backbone_kwargs=kwargs)
            output = MultiExitForImageClassification(config).eval()(images, output_hidden_states=True)
        if [ours.shape for ours in output.exit_maps] != [theirs.shape for theirs in maps]:
            return f"{size}: {[tuple(m.shape) for m in output.exit_maps]} instead of {[tuple(m.shape) for m in maps]}"
        sizes.append(size)
    return True if sizes else "not applicable: timm takes none of them"


def _channels(name: str) -> str | bool:
    for channels in (1, 4):
        with torch.device("meta"), torch.no_grad():
            plain = timm.create_model(name, in_chans=channels, num_classes=CLASSES).eval()
            try:
                plain(torch.empty(2, channels, *plain.pretrained_cfg["input_size"][1:]))
            except RuntimeError as error:
                return f"not applicable: timm's own model takes no {channels} channels ({str(error)[:60]})"
        config = MultiExitConfig(backbone=name, num_labels=CLASSES, backbone_kwargs={"in_chans": channels})
        with torch.device("meta"):
            MultiExitForImageClassification(config)  # runs the backbone on such images
    return True


def _round_trip(model: MultiExitForImageClassification, images: Tensor) -> str | bool:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = MultiExitForImageClassification.from_pretrained(folder).eval()
    model(images), loaded(images)  # both, because some buffers are caches that a call fills (convit)
    ours, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (model, loaded))
    if ours.keys() != theirs.keys():
        return f"keys differ: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    wrong = [key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])]
    return True if not wrong else f"{len(wrong)} tensors differ, such as {wrong[0]}"


def _trains(model: MultiExitForImageClassification, plain: nn.Module, images: Tensor) -> tuple[str | bool, list[str]]:
    """Compare which parameters get no gradient in one step, of plain timm and of all exits."""
    labels = torch.arange(len(images))
    cross_entropy(plain.train()(images), labels).backward()
    unused = {
        name for name, parameter in plain.named_parameters() if parameter.requires_grad and parameter.grad is None
    }
    loss = add(cross_entropy(logits, labels) for logits in model.train()(images).exit_logits)
    if not loss.isfinite():
        return f"loss is {loss.item()}", sorted(unused)
    loss.backward()
    wanting = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None and name.removeprefix("backbone.") not in unused
    ]
    infinite = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if wanting or infinite:
        return f"no gradient: {wanting[:3]}, not finite: {infinite[:3]}", sorted(unused)
    return True, sorted(unused)


def _checkpointing(model: MultiExitForImageClassification, images: Tensor) -> str | bool:
    if not model.anatomy.hooked:
        return "not applicable: only forward_intermediates gives its stages"
    try:
        model.backbone.set_grad_checkpointing(True)
    except AssertionError as error:
        return f"not applicable: timm says {error}"
    seen = Collector()
    run(model.backbone.train(), model.anatomy, images, seen)
    silent = sorted(set(range(len(model.anatomy.stages))) - seen.outputs.keys())
    return True if not silent else f"stages {silent} are silent"


def _same(ours: Iterable[Tensor], theirs: Iterable[Tensor], exact: bool = True) -> str | bool:
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine.shape != other.shape:
            return f"tensor {index} is shaped {tuple(mine.shape)} instead of {tuple(other.shape)}"
        if not mine.isfinite().all():
            return f"tensor {index} is not finite"
        difference = (mine - other).abs().max().item()
        # Kernels for another batch size add in another order.
        if difference > (0 if exact else 1e-4 * other.abs().max().item()):
            return f"tensor {index} differs by {difference:.1e} of {other.abs().max().item():.1e}"
    return True


def _check(check: Callable[..., str | bool], *args: Any) -> str | bool:
    try:
        return check(*args)
    except Exception as error:  # a check that fails is a result, not the end of the census
        return _first_line(error)


@torch.no_grad()
def _images(plain: nn.Module) -> Tensor:
    """Return three images that differ, of the size the backbone was built for where it takes no other."""
    contrast = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
    images = contrast * torch.randn(3, 3, *SIZE)
    try:
        plain(images)
    except (AssertionError, RuntimeError, ValueError):
        images = contrast * torch.randn(3, *plain.pretrained_cfg["input_size"])
    return images


def _random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _module(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def _record(path: Path, part: str, name: str, measured: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    record = {"part": part, "name": name, "module": _module(name)}
    start = time.perf_counter()
    try:
        record |= measured(name)
    except Exception as error:
        record["reason"] = _first_line(error)
    record["seconds"] = round(time.perf_counter() - start, 1)
    gc.collect()
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)
    return record


def representatives(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the record of the smallest model of every timm module and class."""
    smallest: dict[tuple[str, str], dict[str, Any]] = {}
    for record in sorted((r for r in records if "reason" not in r), key=lambda r: (r["parameters"], r["name"])):
        smallest.setdefault((record["module"], record["class"]), record)
    return sorted(smallest.values(), key=lambda r: r["parameters"])


# What is done with the representatives, by part.
MEASURES = {"real": examine, "cut": cut}


def census(path: Path, names: list[str], parts: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Run what ``path`` does not hold yet and return all records, by part."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {(record["part"], record["name"]): record for record in done}
    for name in names if "meta" in parts else []:
        if ("meta", name) not in found:
            found["meta", name] = _record(path, "meta", name, attach)
    meta = [found["meta", name] for name in names if ("meta", name) in found]
    measures = {part: measured for part, measured in MEASURES.items() if part in parts}
    records: dict[str, list[dict[str, Any]]] = {"meta": meta} | {part: [] for part in MEASURES}
    for record in representatives(meta) if measures else []:
        name = record["name"]
        if record["parameters"] > MAX_PARAMETERS:
            too_large = {"name": name, "module": record["module"], "skipped": f"{record['parameters']:,} parameters"}
            records["real"].append(too_large)
            continue
        for part, measured in measures.items():
            if (part, name) not in found:
                found[part, name] = _record(path, part, name, measured)
        for part in MEASURES:
            if (part, name) in found:
                records[part].append(found[part, name])
    return records


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--names", nargs="+", help="timm names instead of all")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--meta-only", action="store_true", help="no real tensors")
    part.add_argument("--real-only", action="store_true", help="of the names whose sizes coverage.jsonl holds")
    part.add_argument("--cut-only", action="store_true", help="likewise, and only whether they can be cut at exits")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    chosen = {"meta": options.meta_only, "real": options.real_only, "cut": options.cut_only}
    parts = [part for part, only in chosen.items() if only] or [*chosen]
    records = census(options.output / "coverage.jsonl", options.names or timm.list_models(), parts)
    if not records["meta"]:
        parser.error("--real-only and --cut-only need the sizes that a run with --meta-only finds.")
    lines = {part: ",\n".join(json.dumps(record) for record in records[part]) for part in records}
    text = ",\n".join(f'"{part}": [\n{rows}\n]' for part, rows in lines.items())
    (options.output / "coverage.json").write_text(f"{{\n{text}\n}}\n")
    (options.output / "coverage.md").write_text(summary(records, MAX_PARAMETERS))
    return records


if __name__ == "__main__":
    main()
