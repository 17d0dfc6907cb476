"""Communication between the processes of a distributed training run (torch.distributed).

``torchrun`` or ``accelerate launch`` start the processes, and the script (or Accelerate) calls
``torch.distributed.init_process_group``. Without a process group everything here is the identity. Networks are used
without DistributedDataParallel (wrappers are removed), because adaptive solves take a different number of steps in each
process and would deadlock in its collective calls.

Networks wrapped by FSDP2 (``torch.distributed.fsdp.fully_shard``) keep a part of every weight in each process and
gather the whole at every call. So all processes have to call them equally often and in the same order.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["Group", "copy_whole", "is_sharded", "plain_class", "reshard", "shard_like", "unwrapped", "whole"]

T = TypeVar("T")


def unwrapped(network: Any) -> Any:
    """The network inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` wrappers, or itself.

    Its weights then have the names that it gave them. A compiled network keeps running compiled, as after
    ``network.compile()``; a distributed one no longer waits for other processes in its calls.
    """
    while True:
        if isinstance(network, DistributedDataParallel | DataParallel):
            network = network.module
        elif hasattr(network, "_orig_mod") and hasattr(network, "dynamo_ctx"):  # torch.compile's OptimizedModule
            inner = network._orig_mod
            if inner._compiled_call_impl is None:
                inner._compiled_call_impl = network.dynamo_ctx(inner._call_impl)
            network = inner
        else:
            return network


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop the whole weights that a forward pass without a backward pass leaves behind.

    As long as they are there, parameters of the outermost module do not look sharded.
    """
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, which all processes have to ask for; another tensor as it is."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut into parts as another one is; as it is if that one is not sharded."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like
    return distribute_tensor(tensor.to(like.device, like.dtype), mesh.device_mesh, mesh.placements)


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a tensor, whole or sharded, into a tensor that may be sharded."""
    target.copy_(shard_like(source, target))


def plain_class(module: Any) -> type[Any]:
    """The class of an object; of a module wrapped by FSDP2 the class that it had before."""
    cls = type(module)
    return cls.__bases__[1] if cls.__module__.startswith("torch.distributed.fsdp") and len(cls.__bases__) == 2 else cls


class Group:
    """The processes of this training run: a single one unless a process group was initialised.

    Args:
        alone: whether this process works by itself nevertheless.
    """

    def __init__(self, alone: bool = False) -> None:
        together = not alone and distributed.is_available() and distributed.is_initialized()
        self.size = distributed.get_world_size() if together else 1
        self.rank = distributed.get_rank() if together else 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> list[tuple[int, T]]:
        """The items that fall to this process (every ``size``-th), each with its place among all."""
        return [(place, item) for place, item in enumerate(items) if place % self.size == self.rank]

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their sums over the processes; one message per dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            distributed.all_reduce(flat)
            for tensor, part in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Replace tensors by those of the main process; sharded ones are the same in all already."""
        if self.size > 1:
            for tensor in tensors:
                if not is_sharded(tensor):
                    distributed.broadcast(tensor, 0)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        count = torch.tensor(float(flag), device=device)
        distributed.all_reduce(count)
        return bool(count > 0.0)

    def of_main(self, action: Callable[[], T]) -> T:
        """What the action gives in the main process, which alone does it; its errors are raised in all."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    def gathered(self, item: T) -> list[T]:
        """The items of all processes, ordered by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        distributed.all_gather_object(items, item)
        return items
