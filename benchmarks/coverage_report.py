"""Render the measurements of coverage.py as a page of Markdown."""

from collections.abc import Iterable
from typing import Any

import timm
import torch
import transformers

CHECKS = {
    "logits": "logits are bit-equal to plain timm's",
    "maps": "feature maps are bit-equal to `forward_intermediates`",
    "features": "features of the final exit are bit-equal to timm's pre-logits, or what its linear layer reads",
    "trains": "finite loss, a gradient to every parameter that plain timm gives one",
    "checkpointing": "hooks report every stage under gradient checkpointing too",
    "sizes": "feature maps have timm's shapes for images of 32x32 and of 224x448 pixels, where timm takes them",
    "channels": "attaches for images of 1 and of 4 channels",
    "round_trip": "`save_pretrained` and `from_pretrained`: weights and all buffers bit-equal",
    "shrinks": "shrinking the batch at each exit gives the rows of the full run",
}


CUTS = {
    "logits": "its parts run one after the other give the logits of all exits",
    "continues": "at every exit they continue with fewer images",
}


def summary(records: dict[str, list[dict[str, Any]]], max_parameters: float) -> str:
    """Write the counts, and the reason for every no, as Markdown."""
    meta, real = records["meta"], [record for record in records["real"] if "skipped" not in record]
    attached = [record for record in meta if "reason" not in record]
    slowest = max(attached, key=lambda record: record["seconds"])
    lines = [
        "# Coverage of timm",
        "",
        f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}, transformers "
        f"{transformers.__version__}, Python on one CPU core. Written by `python benchmarks/coverage.py`.",
        "",
        f"## All {len(meta):,} names, on the meta device",
        "",
        f"- attached: {len(attached):,} ({len(attached) / len(meta):.1%})",
        f"- of these by hooks at every stage: {sum(record['hooks'] for record in attached):,}; by "
        f"`forward_intermediates`: {_modules(record for record in attached if not record['hooks'])}",
        f"- stages end in their order: {sum(record['in_order'] for record in attached):,}; not in "
        f"{_modules(record for record in attached if not record['in_order'])}",
        f"- random states unchanged: {sum(record['random_states_kept'] for record in attached):,}",
        f"- seconds per name: {sum(r['seconds'] for r in attached) / len(attached):.1f} on average, "
        f"{slowest['seconds']:.0f} at most ({slowest['name']})",
        "",
        *(f"- **no** {record['name']}: {record['reason']}" for record in meta if "reason" in record),
        "",
        f"## The smallest model of each of {len(records['real'])} classes, with real tensors",
        "",
        f"{len(real)} were run; the others have more than {max_parameters / 1e6:.0f} million parameters: "
        + (", ".join(record["name"] for record in records["real"] if "skipped" in record) or "none")
        + ".",
        "",
        "| check | yes | no | not applicable |",
        "| --- | --- | --- | --- |",
        *(_row(check, text, real) for check, text in CHECKS.items()),
        "",
        *(f"- **no** {check}, {name}: {reason}" for check, name, reason in _noes(real)),
        "",
        "Parameters without a gradient in plain timm in the same step:",
        "",
        *(
            f"- {record['name']}: {', '.join(record['without_gradient_in_timm'][:4])}"
            + (
                f" and {len(record['without_gradient_in_timm']) - 4} more"
                * (len(record["without_gradient_in_timm"]) > 4)
            )
            for record in real
            if record.get("without_gradient_in_timm")
        ),
    ]
    if records.get("cut"):
        lines += _cuts(records["cut"])
    return "\n".join(lines) + "\n"


def _cuts(cuts: list[dict[str, Any]]) -> list[str]:
    """Write how many networks are cut at their exits, and the reason for every no."""
    done = [record for record in cuts if "reason" not in record]
    return [
        "",
        f"## Cut at the exits, for files that exit early: {len(done)} of {len(cuts)}",
        "",
        *(f"- {text}: {sum(record[check] is True for record in done)}" for check, text in CUTS.items()),
        "",
        *(f"- **no** cut, {record['name']}: {record['reason']}" for record in cuts if "reason" in record),
        *(
            f"- **no** {check}, {record['name']}: {record[check]}"
            for check in CUTS
            for record in done
            if record[check] is not True
        ),
    ]


def _modules(records: Iterable[dict[str, Any]]) -> str:
    return ", ".join(sorted({record["module"] for record in records})) or "none"


def _row(check: str, text: str, real: list[dict[str, Any]]) -> str:
    outcomes = [record.get(check, record.get("reason")) for record in real]
    yes = sum(outcome is True for outcome in outcomes)
    neither = sum(str(outcome).startswith("not applicable") for outcome in outcomes)
    return f"| {text} | {yes} | {len(outcomes) - yes - neither} | {neither} |"


def _noes(real: list[dict[str, Any]]) -> Iterable[tuple[str, str, str]]:
    for check in CHECKS:
        for record in real:
            outcome = record.get(check, record.get("reason"))
            if outcome is not True and not str(outcome).startswith("not applicable"):
                yield check, record["name"], outcome
