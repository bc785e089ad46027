"""Time saved by early exit on this machine, and the quality of its calibration.

    python benchmarks/early_exit.py --parts realised batch overhead --rounds 15
    python benchmarks/early_exit.py --parts calibration guarantee --checkpoint runs/byot --dataset cifar10

Each part replaces its own entry in the JSON file of results, from which the Markdown table is written again. The part
`batch` compares with earlyon (pip install earlyon), `calibration` too. Weights of the timing parts are random: the
time does not depend on them, only on which images exit where.
"""

import argparse
import json
import os
import platform
import sys
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
from timing import ratio, time_in_turn
from torch import Tensor, nn

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, calibrate, exit_costs
from hf_selfkd.calibration import fit_policy, gather_evidence, solve
from hf_selfkd.deploy.export_exit import StaticExit
from hf_selfkd.evaluation.curves import collect_logits, to_table

RESNET, VIT = "resnet50", "vit_small_patch16_224"
TARGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


# Models and images


def unlike_images(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator) * torch.linspace(0.3, 3, count).view(-1, 1, 1, 1)


def create(name: str, **config) -> MultiExitForImageClassification:
    torch.manual_seed(0)
    return MultiExitForImageClassification.from_backbone(name, **config).eval()


@torch.no_grad()
def exiting_at(model, images: Tensor, exit: int, count: int) -> ExitPolicy:
    """Return a policy by which all heads run and the `count` most confident images exit early, at one exit only."""
    logits = model(images, output_hidden_states=True).exit_logits[exit]
    confidence = logits.softmax(dim=1).amax(dim=1).sort(descending=True).values
    thresholds = [1.0] * (model.num_exits - 1)  # heads run, and random weights are never as confident as that
    if count:
        thresholds[exit] = confidence[count - 1 : count + 1].mean().item()
    policy = ExitPolicy(thresholds=thresholds)
    exits = model.early_exit(images, policy).exit_index
    assert (exits == exit).sum() == count and (exits == model.num_exits - 1).sum() == len(images) - count
    return policy


# The parts of a network, timed alone


class Rest(nn.Module):
    """All layers after a stage of a ResNet or ViT, from its raw output to the logits."""

    def __init__(self, backbone: nn.Module, stage: int):
        super().__init__()
        if hasattr(backbone, "layer4"):
            layers = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4][stage:]
            self.layers = nn.Sequential(*layers, backbone.global_pool, backbone.fc)
        else:
            self.layers = nn.Sequential(*backbone.blocks[stage + 1 :], backbone.norm)
            self.head = backbone.forward_head

    def forward(self, stage_output: Tensor) -> Tensor:
        """Return logits."""
        output = self.layers(stage_output)
        return self.head(output) if hasattr(self, "head") else output


@torch.no_grad()
def stage_outputs(model, images: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return raw outputs and feature maps of the stages that have exits."""
    seen = {}
    for stage in model.exit_stages:
        module = model.backbone.get_submodule(model.anatomy.stages[stage].module)
        handle = module.register_forward_hook(lambda module, args, output, stage=stage: seen.update({stage: output}))
        model.backbone(images)
        handle.remove()
    size = tuple(images.shape[-2:])
    return seen, {stage: model._feature_map(stage, output, size) for stage, output in seen.items()}


def trunk(model, exit: int):
    """Return timm's network up to the stage of an exit, without any head."""
    static = StaticExit(model, exit)
    return lambda images: static.backbone.forward_intermediates(
        images, indices=static.indices, intermediates_only=True, stop_early=True
    )


def realised(rounds: int) -> list[dict]:
    """Half of the images exit at the middle exit: measured time against the sum of the times of the parts."""
    rows = []
    for name in (RESNET, VIT):
        model = create(name)
        costs = exit_costs(model)
        for batch_size in (1, 16):
            candidates = candidates_of_parts(model, batch_size)
            parts = [(1.0, part) for part in ("trunk", "head 0", "head 1", "rest", "head 2")]
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    times = time_in_turn(candidates, rounds)
                row = {"model": name, "batch": batch_size, "threads": threads}
                for clock in ("wall", "cpu"):
                    row[f"realised over implied ({clock})"] = ratio(times, parts, "early", clock)
                row["realised speed-up (wall)"] = ratio(times, [(1.0, "plain")], "early", "wall")
                row["counted speed-up"] = costs[-1] / ((costs[1] + costs[-1]) / 2)
                rows.append(row)
                print(row, flush=True)
    return rows


@torch.no_grad()
def candidates_of_parts(model, batch_size: int) -> dict:
    """Return early exit, the plain network, and the parts that the images run through, one by one or as a batch."""
    images = unlike_images(max(2, batch_size), 224)
    policy = exiting_at(model, images, 1, len(images) // 2)
    images = images[model.early_exit(images, policy).exit_index.argsort()]  # those that exit early come first
    outputs, maps = stage_outputs(model, images)
    first, middle, last = model.exit_stages
    cut, rest = trunk(model, 1), Rest(model.backbone, middle)
    torch.testing.assert_close(rest(outputs[middle]), model.backbone(images), atol=1e-3, rtol=1e-3)
    half = len(images) // 2

    def each(call, tensor):
        for part in tensor.split(batch_size):
            call(part)

    return {
        "early": lambda: each(partial(model.early_exit, policy=policy), images),
        "plain": lambda: each(model.backbone, images),
        "trunk": lambda: each(cut, images),
        "head 0": lambda: each(model.exits[0], maps[first]),
        "head 1": lambda: each(model.exits[1], maps[middle]),
        "rest": lambda: rest(outputs[middle][half:]),
        "head 2": lambda: model.exits[2](maps[last][half:]),
    }


def overhead(rounds: int) -> list[dict]:
    """No image exits early: time over that of plain timm plus its heads, each timed alone."""
    rows = []
    for name in (RESNET, VIT):
        model = create(name)
        for batch in (1, 16):
            images = unlike_images(batch, 224)
            policy = exiting_at(model, images, 0, 0)
            maps = stage_outputs(model, images)[1]
            candidates = {"early": partial(model.early_exit, images, policy), "plain": partial(model.backbone, images)}
            for exit, stage in enumerate(model.exit_stages):
                candidates[f"head {exit}"] = partial(model.exits[exit], maps[stage])
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    times = time_in_turn(candidates, rounds)
                parts = [(1.0, part) for part in candidates if part != "early"]
                row = {"model": name, "batch": batch, "threads": threads}
                for clock in ("wall", "cpu"):
                    row[f"time over parts ({clock})"] = 1 / ratio(times, parts, "early", clock)
                rows.append(row)
                print(row, flush=True)
    return rows


def batch(rounds: int) -> list[dict]:
    """A batch of 16 images of which nine exit at the first exit, against the alternatives."""
    from earlyon.models.custom import custom_ee

    images = unlike_images(16, 160)
    model = create(RESNET)
    policy = exiting_at(model, images, 0, 9)
    peer = custom_ee(
        create(RESNET).backbone, ["layer1", "layer2", "layer3"], 1000, input_shape=(1, 3, 160, 160)
    ).eval()
    with torch.no_grad():
        confidence = peer(images, mode="training")[0].softmax(dim=1).amax(dim=1).sort(descending=True).values
    peer.config.confidence_thresholds = [confidence[8:10].mean().item(), 1.0, 1.0]
    taken = [peer(image[None], mode="inference").exit_taken for image in images]
    assert taken.count(0) == 9 and taken.count(-1) == 7
    candidates = {
        "early": partial(model.early_exit, images, policy),
        "plain timm": partial(model.backbone, images),
        "earlyon, batched call": partial(peer.forward_inference_batched, images),
        "earlyon, loop of batch 1": lambda: [peer(image[None], mode="inference") for image in images],
        "ours, loop of batch 1": lambda: [model.early_exit(image[None], policy) for image in images],
    }
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            times = time_in_turn(candidates, rounds)
        for name in list(candidates)[1:]:
            row = {"against": name, "threads": threads}
            for clock in ("wall", "cpu"):
                row[f"speed-up ({clock})"] = ratio(times, [(1.0, name)], "early", clock)
            rows.append(row)
            print(row, flush=True)
    return rows


# Calibration


def synthetic(num_images: int) -> tuple[Tensor, Tensor]:
    """Make over-confident logits of four exits that agree more often than by chance and differ in accuracy."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(100, (num_images,), generator=generator)
    hardness, shared = torch.randn(num_images, generator=generator), torch.randn(num_images, 100, generator=generator)
    exits = []
    for skill in (2.2, 2.9, 3.3, 3.6):
        logits = 0.7 * shared + 0.7 * torch.randn(num_images, 100, generator=generator)
        logits[torch.arange(num_images), labels] += (skill - 0.9 * hardness).clamp(min=0.2)
        exits.append(2.5 * logits)
    return torch.stack(exits), labels


def real(checkpoint: str, dataset: str) -> tuple[Tensor, Tensor, list[float]]:
    """Run a trained checkpoint on the unseen evaluation split."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import timm
    from data import DataArguments, LabelledImages, load_images

    model = MultiExitForImageClassification.from_pretrained(checkpoint).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.config.pretrained_cfg))
    images, _ = load_images(DataArguments(dataset=dataset))
    logits, labels = collect_logits(
        model, torch.utils.data.DataLoader(LabelledImages(images["test"], transform), batch_size=250)
    )
    return logits, labels, exit_costs(model)


def exhaustive(evidence, levels: int = 60) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return accuracy and cost of every combination of quantiles of three exits' scores, and the quantiles."""
    grids = [torch.quantile(scores, torch.linspace(0, 1, levels)) for scores in evidence.scores]
    reached = [torch.bucketize(scores, grid, right=True) for scores, grid in zip(evidence.scores, grids, strict=True)]
    cells = (reached[0] * (levels + 1) + reached[1]) * (levels + 1) + reached[2]

    def below(histogram: Tensor, axis: int) -> Tensor:
        return torch.cat([torch.zeros_like(histogram.narrow(axis, 0, 1)), histogram.cumsum(axis)], axis)

    def above(histogram: Tensor, axis: int) -> Tensor:
        sums = below(histogram, axis)
        return sums.narrow(axis, levels + 1, 1) - sums

    def total(weights: list[Tensor]) -> Tensor:  # sums of weights[exit] over the images that exit there
        first, second, third, final = (
            torch.bincount(cells, weights=weight, minlength=(levels + 1) ** 3).reshape([levels + 1] * 3)
            for weight in weights
        )
        return (
            above(first.sum((1, 2)), 0)[:, None, None]
            + above(below(second.sum(2), 0), 1)[:, :, None]
            + above(below(below(third, 0), 1), 2)
            + below(below(below(final, 0), 1), 2)
        ) / len(cells)

    ones = torch.ones(len(cells), dtype=torch.float64)
    return total(list(evidence.correct)), total([ones * cost for cost in evidence.costs]), grids


class CachedLogits:
    """Logits in place of a model, for earlyon to calibrate on."""

    def __init__(self, logits: Tensor, costs: list[float]):
        from earlyon.core.types import EarlyExitConfig, ExitPoint

        points = [ExitPoint(f"e{exit}", f"layer{exit}", 1) for exit in range(len(costs) - 1)]
        self.config = EarlyExitConfig("cached", logits.shape[-1], points)
        self._flops_at = {point.layer_name: cost / costs[-1] for point, cost in zip(points, costs, strict=False)}
        self.logits, self.training = logits, False

    def to(self, device):
        """Do nothing: there are no weights."""
        return self

    def eval(self):
        """Do nothing: there are no modes."""
        return self

    def train(self, mode):
        """Do nothing: there are no modes."""
        return self

    def __call__(self, indices, mode):
        """Return the logits of all exits."""
        return list(self.logits[:, indices])


def calibrate_peer(logits, labels, costs, target, fit_temperature) -> ExitPolicy:
    """Calibrate on logits for a budget with earlyon, and return its policy as an ExitPolicy."""
    from earlyon.core.thresholds import calibrate_thresholds_for_budget

    model = CachedLogits(logits, costs)
    loader = [(torch.arange(len(labels)), labels)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about temperatures that are fitted on the same images, as ours are
        calibrate_thresholds_for_budget(model, loader, target, fit_temperature=fit_temperature)
    config = model.config
    thresholds = [
        threshold if enabled else 2.0
        for threshold, enabled in zip(config.confidence_thresholds, config.enabled_exits, strict=True)
    ]
    temperatures = [config.temperatures[name] for name in config.head_names]
    return ExitPolicy(thresholds=thresholds, temperatures=temperatures)


def score(policy: ExitPolicy, logits, labels, costs) -> tuple[float, float]:
    evidence = gather_evidence(logits, labels, costs, policy)
    return evidence.measure(list(policy.thresholds))


def calibration(sources: dict) -> list[dict]:
    """Accuracy at given budgets, against exhaustive search and against earlyon at its achieved cost."""
    rows = []
    for source, (logits, labels, costs) in sources.items():
        half = len(labels) // 2
        given, kept = (logits[:, :half], labels[:half], costs), (logits[:, half:], labels[half:], costs)
        policy = fit_policy(*given[:2])
        evidence = gather_evidence(*given, policy)
        accuracy, cost, grids = exhaustive(evidence)
        for target in TARGETS:
            if target < evidence.costs.min():
                continue
            ours = solve(policy, evidence, target_cost=target)
            best = int(accuracy.masked_fill(cost > target, -1).argmax())
            places = torch.unravel_index(torch.tensor(best), accuracy.shape)
            grid_policy = ExitPolicy(
                thresholds=[[0.0, *grid.tolist(), 2.0][place] for grid, place in zip(grids, places, strict=True)],
                temperatures=policy.temperatures,
            )
            assert score(grid_policy, *given)[1] <= target + 1e-9
            row = {"logits": source, "target": target}
            row["ours, calibration"] = 100 * ours.calibration["expected_accuracy"]
            row["exhaustive, calibration"] = 100 * score(grid_policy, *given)[0]
            row["ours, test"] = 100 * score(ours, *kept)[0]
            row["exhaustive, test"] = 100 * score(grid_policy, *kept)[0]
            for fit_temperature, name in ((False, "earlyon"), (True, "earlyon with temperature")):
                peer = calibrate_peer(*given, target, fit_temperature)
                peer_accuracy, peer_cost = score(peer, *kept)
                row[f"{name}, test"], row[f"{name}, cost"] = 100 * peer_accuracy, peer_cost
                # For equal cost on the test images, the target is the cost of theirs on the calibration images.
                match = solve(policy, evidence, target_cost=min(1.0, score(peer, *given)[1]))
                matched_accuracy, matched_cost = score(match, *kept)
                row[f"ours at {name}'s cost"], row[f"our cost at {name}'s"] = 100 * matched_accuracy, matched_cost
            rows.append(row)
            print(row, flush=True)
    return rows


def guarantee(sources: dict, splits: int) -> list[dict]:
    """Share of random calibration and test splits in which the risk on the test images exceeds `max_risk`."""
    rows = []
    for source, (logits, labels, costs) in sources.items():
        for against, max_risk in (("labels", 0.02), ("final exit", 0.05)):
            exceeded, early, saved = 0, 0, []
            for split in range(splits):
                order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split))
                given, kept = order[: len(order) // 2], order[len(order) // 2 :]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # splits on which no policy can be certified
                    targets = labels[given] if against == "labels" else None
                    policy = calibrate(logits[:, given], targets, costs, max_risk=max_risk, delta=0.05)
                targets = labels[kept] if against == "labels" else None
                evidence = gather_evidence(logits[:, kept], targets, costs, policy)
                accuracy, cost = evidence.measure(list(policy.thresholds))
                exceeded += evidence.correct[-1].mean().item() - accuracy > max_risk
                early += cost < 1
                saved.append(1 - cost)
            row = {"logits": source, "risk against": against, "max_risk": max_risk, "delta": 0.05, "splits": splits}
            row |= {"exceeded": exceeded / splits, "exits early": early / splits, "compute saved": median(saved)}
            rows.append(row)
            print(row, flush=True)
    return rows


def write(path: Path, results: dict) -> None:
    """Write the results as JSON, and a Markdown table of them next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    titles = {
        "realised": realised.__doc__,
        "batch": batch.__doc__,
        "overhead": overhead.__doc__,
        "calibration": calibration.__doc__,
        "guarantee": guarantee.__doc__,
    }
    sections = ["Written by `benchmarks/early_exit.py`."]
    for part, title in titles.items():
        if part in results:
            about = results[part]["about"]
            sections.append(f"## {part}\n\n{title}\n\n{', '.join(f'{k}: {v}' for k, v in about.items())}")
            sections.append(to_table(results[part]["rows"]))
    path.with_suffix(".md").write_text("\n\n".join(sections) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["realised", "batch", "overhead", "calibration", "guarantee"])
    parser.add_argument("--rounds", type=int, default=15, help="Rounds of timing.")
    parser.add_argument("--splits", type=int, default=1000, help="Random splits for the guarantee.")
    parser.add_argument(
        "--checkpoint", help="A trained multi-exit checkpoint with four exits; without it, synthetic logits only."
    )
    parser.add_argument("--dataset", default="cifar10", help="As for examples/train_cifar.py.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "early_exit.json")
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    timed = {"realised": realised, "batch": batch, "overhead": overhead}
    about = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    for part in options.parts:
        if part in timed:
            load = os.getloadavg()[0]
            rows = timed[part](options.rounds)
            entry = about | {
                "rounds": options.rounds,
                "load at the start and end": f"{load:.1f}, {os.getloadavg()[0]:.1f}",
            }
        else:
            # The search is evaluated on many images; the guarantee on as few as users have.
            count = 60_000 if part == "calibration" else 10_000
            sources = {"synthetic": (*synthetic(count), [0.192, 0.4435, 0.8016, 1.0])}
            if options.checkpoint:
                sources["trained checkpoint"] = real(options.checkpoint, options.dataset)
            rows = calibration(sources) if part == "calibration" else guarantee(sources, options.splits)
            entry = about
        results[part] = {"about": entry, "rows": rows}
        write(options.output, results)


if __name__ == "__main__":
    main()
