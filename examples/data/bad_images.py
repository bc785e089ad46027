"""Skip training images that cannot be read."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset


def leave_out_bad_images(rows: Dataset, read: Callable[[Any], Any], limit: int, num_workers: int = 0) -> Dataset:
    """Remove the unreadable rows of a training split, and list them.

    Every image is read once before training, so that the count holds for all workers, processes and epochs together,
    and the order of the others does not depend on where a bad one lies. ``datasets`` caches the result.

    Args:
        rows: The split.
        read: Reads a row, or raises.
        limit: Maximum number of rows to remove.
        num_workers: Processes to read with.

    Raises:
        ValueError: If more rows than ``limit`` are unreadable.
    """
    faults = rows.map(
        partial(_find_fault, read=read),
        num_proc=num_workers or None,
        remove_columns=rows.column_names,
        desc="Looking for bad images",
    )["fault"]
    bad = {index: fault for index, fault in enumerate(faults) if fault}
    listed = "".join(f"\n  row {index}: {fault}" for index, fault in bad.items())
    if len(bad) > limit:
        raise ValueError(f"{len(bad)} training images cannot be read, but --skip_bad_images is {limit}:{listed}")
    if bad and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
        print(f"--skip_bad_images: left out {len(bad)} of {len(rows)} training images:{listed}", flush=True)
    return rows.select([index for index, fault in enumerate(faults) if not fault])


def _find_fault(row: Any, read: Callable[[Any], Any]) -> dict[str, str]:
    try:
        read(row)
    except Exception as error:  # of any kind: the image cannot be trained on
        return {"fault": str(error) or type(error).__name__}
    return {"fault": ""}
