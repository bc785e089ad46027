"""Overhead of training beyond its arithmetic: each case is a ratio to the lowest possible cost.

    python benchmarks/training.py --rounds 9
    python benchmarks/training.py --parts pipeline --dataset path/to/cifar10

Each part replaces its own entry in the JSON file of results, from which the Markdown table is written again.
"""

import argparse
import copy
import gc
import inspect
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from published import LOSSES, train
from timing import ratio, time_in_turn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from transformers import TrainingArguments, default_data_collator

from hf_selfkd import MultiExitForImageClassification, MultiExitOutput, SelfDistillationTrainer, get_method
from hf_selfkd.evaluation.curves import to_table
from hf_selfkd.functional import add, counted_over_processes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

METHODS = ("none", "deep_supervision", "byot", "eed", "lsh", "frskd", "okd_mde")
NARROW = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}
# name -> (options of the model, side of the images, batch size, whether in bf16)
WORKLOADS = {
    "ResNet-18, 96 px, float32": ({}, 96, 8, False),
    "narrow ResNet, 32 px, bf16": ({"backbone_kwargs": NARROW, "small_input_stem": True}, 32, 128, True),
}
CLASSES = 100


def create(workload: str, method: str, **config) -> tuple[nn.Module, object]:
    """Build a model and a method as the trainer joins them."""
    torch.manual_seed(0)
    model = MultiExitForImageClassification.from_backbone(
        "resnet18", num_labels=CLASSES, **(WORKLOADS[workload][0] | config)
    )
    method = get_method(method)
    method.attach(model)
    return model.train(), method


def data(workload: str) -> tuple[Tensor, Tensor]:
    _, side, batch_size, _ = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, side, side, generator=generator)
    return images, torch.randint(CLASSES, (batch_size,), generator=generator)


def total(method, output: MultiExitOutput, labels: Tensor) -> Tensor:
    """Add up the terms as the trainer does."""
    return add(method.terms(output, labels, 0.0).values())


def forward_and_add(method, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return total(method, model(images), labels)


def step(model: nn.Module, loss, bf16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss()
    value.backward()
    model.zero_grad()


def candidates_of_step(workload: str, name: str) -> dict:
    """Return the method's step, plain timm's, and the method's own modules and loss on tensors of the same shapes."""
    model, method = create(workload, name)
    images, labels = data(workload)
    bf16 = WORKLOADS[workload][3]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        given = model(images, output_hidden_states=True)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    maps = [leaf(feature_map) for feature_map in given.stage_outputs]
    logits, features = leaf(given.logits), leaf(given.exit_features[-1])

    def alone() -> Tensor:
        outputs = [
            head(maps[stage].detach() if model.detach_exits else maps[stage])
            for head, stage in zip(model.exits, model.exit_stages, strict=True)
        ]
        exit_logits, exit_features = zip(*outputs, (logits, features), strict=True)
        output = MultiExitOutput(
            logits=logits,
            exit_logits=exit_logits,
            exit_features=exit_features,
            exit_maps=tuple(maps),
            stage_outputs=tuple(maps),
        )
        output.scaffold = None if model.scaffold is None else model.scaffold(images, output)
        return total(method, output, labels)

    def forget() -> None:
        for tensor in (*maps, logits, features):
            tensor.grad = None

    del given
    plain = copy.deepcopy(model.backbone)  # its hooks do nothing outside of a call of the model

    def run_alone() -> None:
        step(model, alone, bf16)
        forget()

    return {
        "method": partial(step, model, partial(forward_and_add, method, model, images, labels), bf16),
        "plain": partial(step, plain, lambda: F.cross_entropy(plain(images), labels), bf16),
        "alone": run_alone,
    }


def steps(rounds: int, dataset: str | None) -> list[dict]:
    """A step, forward and backward, over plain timm's plus the method's own modules and loss timed alone."""
    rows = []
    for workload in WORKLOADS:
        for name in METHODS:
            candidates = candidates_of_step(workload, name)
            times = time_in_turn(candidates, rounds)
            row = {"workload": workload, "method": name}
            for clock in ("wall", "cpu"):
                row[f"over its parts ({clock})"] = 1 / ratio(times, [(1, "plain"), (1, "alone")], "method", clock)
            row["over plain timm (cpu)"] = ratio(times, [(1, "method")], "plain", "cpu")
            row["multiply-adds over plain timm"] = count(candidates["method"]) / count(candidates["plain"])
            rows.append(row)
            print(row, flush=True)
    return rows


def count(candidate) -> int:
    with FlopCounterMode(display=False) as counter:
        candidate()
    return counter.get_total_flops()


def formats(rounds: int, dataset: str | None) -> list[dict]:
    """A step of deep supervision in bfloat16 and in channels_last, over float32 in the default layout."""
    rows = []
    for workload in WORKLOADS:
        candidates = {}
        for layout in ("contiguous_format", "channels_last"):
            model, method = create(workload, "deep_supervision")
            images, labels = data(workload)
            model, images = (thing.to(memory_format=getattr(torch, layout)) for thing in (model, images))
            for dtype in ("float32", "bfloat16"):
                loss = partial(forward_and_add, method, model, images, labels)
                candidates[f"{layout}, {dtype}"] = partial(step, model, loss, dtype == "bfloat16")
        times = time_in_turn(candidates, rounds)
        plain, *others = candidates
        row = {"workload": workload.rpartition(",")[0]}
        rows.append(row | {f"{name} (cpu)": ratio(times, [(1, name)], plain, "cpu") for name in others})
        print(rows[-1], flush=True)
    return rows


def memory(rounds: int, dataset: str | None) -> list[dict]:
    """Peak allocation of a step, over plain timm's peak plus the tensors that the method needs.

    That is: the distinct tensors that its graph keeps for the backward pass beyond plain timm's, and the gradients of
    its own parameters.
    """
    rows = []
    for workload in WORKLOADS:
        for name in METHODS:
            candidates = candidates_of_step(workload, name)
            plain, method = candidates["plain"], candidates["method"]
            row = {
                "workload": workload,
                "method": name,
                "plain (MB)": peak(plain) / 1e6,
                "method (MB)": peak(method) / 1e6,
            }
            model = method.args[0]
            own = [p for name, p in model.named_parameters() if not name.startswith("backbone.") and p.requires_grad]
            added = saved(method) - saved(plain) + sum(parameter.nbytes for parameter in own)
            row["implied (MB)"] = row["plain (MB)"] + added / 1e6
            row["over implied"] = row["method (MB)"] / row["implied (MB)"]
            rows.append(row)
            print(row, flush=True)
    return rows


def saved(candidate) -> int:
    """Return the bytes of distinct tensors that a step makes and keeps for its backward pass."""
    sizes = {}
    model = candidate.args[0]
    there = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        candidate()
    return sum(sizes.values())


def peak(candidate) -> int:
    """Return the most bytes that are allocated at once beyond those at the start."""
    candidate()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        candidate()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def losses(rounds: int, dataset: str | None) -> list[dict]:
    """The loss terms alone, forward and backward, over the published formula in bare PyTorch."""
    rows = []
    for classes in (100, 1000):
        for batch_size in (128, 1024):
            for name in ("deep_supervision", "byot", "eed", "lsh"):
                candidates = candidates_of_loss(name, classes, batch_size)
                times = time_in_turn(candidates, rounds)
                row = {"loss": name, "classes": classes, "batch": batch_size}
                for clock in ("wall", "cpu"):
                    row[f"over bare PyTorch ({clock})"] = ratio(times, [(1, "ours")], "bare", clock)
                rows.append(row)
                print(row, flush=True)
    return rows


def candidates_of_loss(name: str, classes: int, batch_size: int) -> dict:
    torch.manual_seed(0)
    model = MultiExitForImageClassification.from_backbone("resnet18", num_labels=classes, backbone_kwargs=NARROW)
    method = get_method(name)
    scaffold = method.scaffold(model)
    labels = torch.randint(classes, (batch_size,))
    logits = [torch.randn(batch_size, classes).requires_grad_() for _ in range(4)]
    features = [torch.randn(batch_size, 128).requires_grad_() for _ in range(4)]

    repeats = 2_000_000 // batch_size // classes + 1  # a single small loss is too short to time

    def run(loss) -> Tensor:
        for _ in range(repeats):
            for tensor in (*logits, *features):
                tensor.grad = None
            value = loss()
            value.backward()
        return value.detach()

    output = MultiExitOutput(logits=logits[-1], exit_logits=tuple(logits), exit_features=tuple(features))

    def ours() -> Tensor:
        output.scaffold = None if scaffold is None else scaffold(None, output)
        return add(method(output, labels, 0.0).values())

    bare = argparse.Namespace(logits=logits, features=features, scaffold=scaffold)
    candidates = {"ours": partial(run, ours), "bare": partial(run, lambda: LOSSES[name](bare, labels, 0))}
    torch.testing.assert_close(candidates["ours"](), candidates["bare"](), rtol=1e-4, atol=1e-4)
    return candidates


def loops(rounds: int, dataset: str | None) -> list[dict]:
    """The trainer over a bare PyTorch loop of the same network, loader and published loss.

    Runs are of ten steps. What is alive before them is kept from Python's garbage collector, because Accelerate runs
    it once in each.
    """
    rows = []
    gc.collect()
    gc.freeze()
    for workload in WORKLOADS:
        cases = [("none", {"exits": []}, "none without exits"), *((name, {}, name) for name in METHODS)]
        for name, config, title in cases:
            times = time_in_turn(candidates_of_loop(workload, name, config), rounds)
            row = {"workload": workload, "method": title}
            for clock in ("wall", "cpu"):
                row[f"trainer over loop ({clock})"] = ratio(times, [(1, "trainer")], "loop", clock)
            rows.append(row)
            print(row, flush=True)
    gc.unfreeze()
    return rows


def candidates_of_loop(workload: str, name: str, config: dict, num_steps: int = 10) -> dict:
    _, side, batch_size, bf16 = WORKLOADS[workload]
    model, _ = create(workload, name, **config)
    model.scaffold = None  # the trainer builds its own
    samples = [
        {"pixel_values": torch.randn(3, side, side), "labels": index % CLASSES}
        for index in range(num_steps * batch_size)
    ]
    args = TrainingArguments(
        tempfile.mkdtemp(),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        optim="sgd",
        learning_rate=1e-4,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=num_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=bf16,
    )
    trainer = SelfDistillationTrainer(model, args, name, train_dataset=samples)
    trainer.log = lambda logs, start_time=None: None
    other = copy.deepcopy(trainer.model)
    loader = DataLoader(samples, batch_size, shuffle=True, collate_fn=default_data_collator, drop_last=False)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-4)
    return {
        "trainer": trainer.train,
        "loop": lambda: train(other, name, loader, optimizer, [0.0] * num_steps, bf16),
    }


def pipeline(rounds: int, dataset: str | None) -> list[dict]:
    """Time that two workers take to deliver images, over timm's readers and loaders with the same transforms."""
    from data import DataArguments
    from timm.data import create_dataset

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        large = DataArguments(dataset=folder, evaluation_split="train", image_size=224, crop_scale=0.08)
        sources = {"224 px, folder of JPEG files": (large, create_dataset("", root=folder))}
        if dataset:
            small = DataArguments(dataset=dataset, max_train_samples=5000)
            timms = create_dataset(f"hfds/{dataset}", split="train", input_key="img")
            sources["32 px, CIFAR-10 parquet"] = (small, timms)
        for title, (arguments, timms) in sources.items():
            candidates, images = candidates_of_pipeline(arguments, timms)
            times = time_in_turn(candidates, rounds)
            row = {"source": title, "images": images}
            row["images per second"] = images / median(times["ours"]["wall"])
            row["over timm's (wall)"] = ratio(times, [(1, "ours")], "timm", "wall")
            row["over timm's prefetcher (wall)"] = ratio(times, [(1, "ours")], "timm, prefetcher", "wall")
            rows.append(row)
            print(row, flush=True)
    return rows


def write_images(folder: Path, count: int = 1500) -> None:
    from torchvision.io import write_jpeg

    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        coarse = torch.rand(1, 3, 12, 16, generator=generator)
        image = F.interpolate(coarse, size=(375, 500), mode="bilinear")[0].mul(255).byte()
        (folder / str(index % 4)).mkdir(exist_ok=True)
        write_jpeg(image, str(folder / str(index % 4) / f"{index}.jpg"))


def candidates_of_pipeline(arguments, timms: Dataset) -> tuple[dict, int]:
    from data import LabelledImages, load_images, training_transform
    from timm.data import create_loader

    splits, _ = load_images(arguments)
    config = {"interpolation": "bilinear", "mean": (0.5, 0.4, 0.6), "std": (0.25, 0.2, 0.3)}
    transform = training_transform(arguments, config)
    args = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=100,
        dataloader_num_workers=2,
        use_cpu=True,
        report_to="none",
    )
    model = MultiExitForImageClassification.from_backbone("test_resnet", num_labels=10)
    ours = LabelledImages(splits["train"], transform)
    trainer = SelfDistillationTrainer(model, args, "none", train_dataset=ours)
    size = (3, arguments.image_size, arguments.image_size)

    def timms_loader(prefetches: bool):
        """Build timm's loader; with its prefetcher it normalises batches, else images."""
        images = copy.copy(timms)
        normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
        images.transform = v2.Compose([transform, *([] if prefetches else normalise)])
        return create_loader(
            Subset(images, range(len(ours))),  # create_loader sets the transform of what it gets
            size,
            args.per_device_train_batch_size,
            is_training=True,
            mean=config["mean"],
            std=config["std"],
            use_prefetcher=prefetches,
            num_workers=args.dataloader_num_workers,
            persistent_workers=False,
            device=torch.device("cpu"),
        )

    loaders = {
        "ours": trainer.get_train_dataloader(),
        "timm": timms_loader(False),
        "timm, prefetcher": timms_loader(True),
    }

    def read(loader) -> None:
        for batch in loader:
            images = trainer._prepare_inputs(batch)["pixel_values"] if isinstance(batch, Mapping) else batch[0]
            assert images.shape[1:] == size and images.dtype == torch.float32

    return {name: partial(read, loader) for name, loader in loaders.items()}, len(ours)


def communication(rounds: int, dataset: str | None) -> list[dict]:
    """Bytes that two processes reduce in a step: of gradients, over those of all trained parameters; and of counts."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(count_traffic, (folder,), nprocs=2)
        rows = json.loads((Path(folder) / "rows.json").read_text())
    for row in rows:
        print(row, flush=True)
    return rows


def count_traffic(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    all_reduce = dist.all_reduce
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = []
    workload = "narrow ResNet, 32 px, bf16"
    for name in METHODS:
        model, method = create(workload, name)
        images, labels = data(workload)
        parallel = nn.parallel.DistributedDataParallel(model)
        reduced, counts = [], []

        def hook(state, bucket, reduced=reduced):
            reduced.append(bucket.buffer().nbytes)
            return all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])

        def counted(tensor, *args, counts=counts, **kwargs):
            counts.append(tensor.nbytes)
            return all_reduce(tensor, *args, **kwargs)

        parallel.register_comm_hook(None, hook)
        for _ in range(2):  # buckets are rebuilt after the first step
            reduced.clear(), counts.clear()
            with mock.patch.object(dist, "all_reduce", counted), counted_over_processes():
                loss = total(method, parallel(images[:16]), labels[:16])
            loss.backward()
        gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        rows.append(
            {
                "method": name,
                "reduced (MB)": sum(reduced) / 1e6,
                "gradients (MB)": gradients / 1e6,
                "ratio": sum(reduced) / gradients,
                "counts of labels (bytes)": sum(counts),
            }
        )
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def startup(rounds: int, dataset: str | None) -> list[dict]:
    """Time to import hf_selfkd over that of transformers with its Trainer, each in a fresh process."""

    def load(statement: str) -> None:
        subprocess.run([sys.executable, "-c", statement], check=True)

    candidates = {
        "ours": partial(load, "import hf_selfkd"),
        "transformers": partial(load, "from transformers import Trainer"),
        "both": partial(load, "import timm; from transformers import Trainer"),
    }
    times = time_in_turn(candidates, rounds)
    return [
        {
            "import": "hf_selfkd",
            "over transformers with Trainer (wall)": ratio(times, [(1, "ours")], "transformers", "wall"),
            "over timm and transformers with Trainer (wall)": ratio(times, [(1, "ours")], "both", "wall"),
        }
    ]


PARTS = {
    "steps": steps,
    "formats": formats,
    "memory": memory,
    "losses": losses,
    "loops": loops,
    "pipeline": pipeline,
    "communication": communication,
    "startup": startup,
}


def summarise(results: dict) -> list[dict]:
    """Return the summary in the README: per method and workload, three ratios that should be 1, and the price."""
    columns = {
        "step over its parts": ("steps", "over its parts (cpu)"),
        "trainer over bare loop": ("loops", "trainer over loop (cpu)"),
        "memory over implied": ("memory", "over implied"),
        "multiply-adds over plain timm": ("steps", "multiply-adds over plain timm"),
        "time over plain timm": ("steps", "over plain timm (cpu)"),
    }

    def cell(method: str, part: str, column: str) -> str:
        found = {row["workload"]: row[column] for row in results[part]["rows"] if row["method"] == method}
        return " / ".join(f"{found[workload]:.2f}" for workload in WORKLOADS)

    return [
        {"method": method} | {title: cell(method, *where) for title, where in columns.items()} for method in METHODS
    ]


def write(path: Path, results: dict) -> None:
    """Write the results as JSON, and a Markdown table of them next to it."""
    path.write_text(json.dumps(results, indent=1) + "\n")
    sections = ["Written by `benchmarks/training.py`."]
    if {"steps", "loops", "memory"} <= results.keys():
        sections.append(f"## Summary\n\n{to_table(summarise(results))}")
    for part, measure in PARTS.items():
        if part in results:
            about = ", ".join(f"{key}: {value}" for key, value in results[part]["about"].items())
            sections.append(f"## {part}\n\n{inspect.getdoc(measure)}\n\n{about}")
            sections.append(to_table(results[part]["rows"]))
    path.with_suffix(".md").write_text("\n\n".join(sections) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=9, help="Rounds of timing.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch.")
    parser.add_argument("--dataset", help="A local folder of CIFAR-10, for the part pipeline.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "training.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for part in options.parts:
        load = os.getloadavg()[0]
        rows = PARTS[part](options.rounds, options.dataset)
        about = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": options.threads,
            "rounds": options.rounds,
            "malloc": " ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("MALLOC_")),
            "load at the start and end": f"{load:.1f}, {os.getloadavg()[0]:.1f}",
        }
        results[part] = {"about": about, "rows": rows}
        write(options.output, results)


if __name__ == "__main__":
    main()
