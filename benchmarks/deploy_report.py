"""Render the measurements of deploy.py as a page of Markdown."""

from typing import Any


def report(results: dict[str, Any]) -> str:
    """Write the tables of the parts that were measured as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = {"time": _time, "size": _size, "equal": _equal, "int8": _int8}
    sections = [table(results[part]) for part, table in parts.items() if part in results]
    return (
        "\n".join(["# Early exit outside Python", "", f"{versions}. Written by `benchmarks/deploy.py`.", *sections])
        + "\n"
    )


def _table(title: str, header: list[str], rows: list[list[Any]]) -> str:
    cells = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in cells)])


def _time(rows: list[dict[str, Any]]) -> str:
    columns = {
        "nobody exits, over the network and its heads": "at most 1.05",
        "nobody exits, over all exits in one static file": "",
        "half exits, realised over implied": "at least 0.9",
        "half exits, times faster than plain": "",
        "half, times faster than one file per exit": "above 1",
        "spread, times faster than one file per exit": "above 1",
    }
    return _table(
        "CPU time with one thread in onnxruntime, ratios (goal)",
        ["model", "batch", *(f"{name} ({goal})" if goal else name for name, goal in columns.items())],
        [[row["model"], row["batch"], *(f"{row[f'{name} (cpu)']:.2f}" for name in columns)] for row in rows],
    )


def _size(rows: list[dict[str, Any]]) -> str:
    columns = [
        "file",
        "memory, batch of 1",
        "peak memory, batch of 1",
        "memory, batch of 16",
        "peak memory, batch of 16",
    ]
    return _table(
        "Over all exits in one static file (goals: file at most 1.05, memory 1.2)",
        ["model", *columns],
        [[row["model"], *(f"{row[name]:.2f}" for name in columns)] for row in rows],
    )


def _equal(rows: list[dict[str, Any]]) -> str:
    columns = ["runtime", "criterion", "images", "settings", "differ", "near", "differ near"]
    return _table(
        "Exits against `early_exit`; near: scores at most 1e-5 from a threshold",
        [*columns, "largest relative difference of logits"],
        [[*(row[name] for name in columns), f"{row['largest difference of logits']:.1e}"] for row in rows],
    )


def _int8(rows: list[dict[str, Any]]) -> str:
    exits = [name for name in rows[0] if name.startswith("exit ")]
    return _table(
        f"Dynamic INT8 of onnxruntime, accuracy in percent, {rows[0]['backbone']}",
        ["file", "KiB", *exits],
        [[row["file"], row["bytes"] // 1024, *(f"{100 * row[name]:.2f}" for name in exits)] for row in rows],
    )
