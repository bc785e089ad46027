"""Start several processes on the CPU, as `accelerate launch` or `torchrun` does."""

import multiprocessing
import os
import socket

import torch
from torch import nn


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def forkserver():
    """Return a context whose processes do not share the state of this one.

    They are forked from a server that has imported the library once, because importing takes longer than a test.
    """
    multiprocessing.set_forkserver_preload(["hf_selfkd"])
    return multiprocessing.get_context("forkserver")


def run_in_processes(function, processes, *arguments):
    """Call a module-level function in several processes of one process group."""
    method = forkserver().get_start_method()
    torch.multiprocessing.start_processes(
        _start, (function, processes, free_port(), arguments), nprocs=processes, start_method=method
    )


def _start(rank, function, processes, port, arguments):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        function(rank, *arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def replace_batch_norm(model):
    """Replace batch norm, which sees the batch of its process only, by group norm."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, nn.GroupNorm(1, child.num_features))
