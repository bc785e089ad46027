"""Several processes that train one model: equal buffers, shared decisions, and sharded weights made complete."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def on_any_process(flag: bool | Tensor, device: torch.device | str = "cpu", group=None) -> bool:
    """Whether a flag is set on at least one process. Every process must call this.

    Args:
        flag: The flag of this process.
        device: Device that the processes communicate on.
        group: Process group; ``None`` for all processes.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return bool(flag)
    shared = torch.as_tensor(flag, device=device).float()
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
    return bool(shared)


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first one: hash planes, batch-norm statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def average_batch_norm(model: nn.Module) -> None:
    """Replace the running statistics of batch norm, which differ between processes, by their mean."""
    if dist.is_initialized():
        distribute_bn(model, dist.get_world_size(), reduce=True)


def gather_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module with sharded tensors (FSDP2) gathered. Every process must call this."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in module.state_dict().items()
    }


def load_gathered_state(module: nn.Module, state: dict[str, Tensor], *, strict: bool = True) -> None:
    """Load the result of :func:`gather_state`; each process takes its shards. Every process must call this.

    Args:
        module: Sharded or not.
        state: Complete tensors.
        strict: As in ``load_state_dict``.
    """
    own = module.state_dict()
    for name, tensor in state.items():
        if isinstance(own.get(name), DTensor):
            mesh, placements = own[name].device_mesh, own[name].placements
            state = state | {name: distribute_tensor(tensor.to(own[name].device), mesh, placements)}
    module.load_state_dict(state, strict=strict)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def unsharded(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Iterator[None]:
    """Gather all weights of a sharded model, so that parts of it can be called separately. On every process.

    Args:
        model: Sharded or not.
        batches: The first one goes through the model: FSDP refuses to call a part before the complete model.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if shards:
        model(next(iter(batches))["pixel_values"])
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
