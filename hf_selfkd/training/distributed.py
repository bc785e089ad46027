"""What several processes that train one model need: equal buffers, and whole tensors where the weights are sharded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first: hash planes, batch-norm statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def average_batch_norm(model: nn.Module) -> None:
    """Replace the running statistics of batch norm, of which each process has its own, by their mean."""
    if dist.is_initialized():
        distribute_bn(model, dist.get_world_size(), reduce=True)


def gather_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module, with sharded tensors (FSDP2) made whole. All processes must call it."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in module.state_dict().items()
    }


def load_gathered_state(module: nn.Module, state: dict[str, Tensor], *, strict: bool = True) -> None:
    """Load what :func:`gather_state` gave, each process taking its shards. All processes must call it.

    Args:
        module: Sharded or not.
        state: Whole tensors.
        strict: As in ``load_state_dict``.
    """
    own = module.state_dict()
    for name, tensor in state.items():
        if isinstance(own.get(name), DTensor):
            mesh, placements = own[name].device_mesh, own[name].placements
            state = state | {name: distribute_tensor(tensor.to(own[name].device), mesh, placements)}
    module.load_state_dict(state, strict=strict)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether the processes hold parts of the weights only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def unsharded(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Iterator[None]:
    """Gather all weights of a sharded model, so that parts of it can be called on their own. On all processes.

    Args:
        model: Sharded or not.
        batches: Of which the first goes through the model: FSDP refuses to call a part before the whole.
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
