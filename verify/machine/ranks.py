"""Several processes that share the windows of one run out among themselves, started by torchrun.

    torchrun --nproc-per-node 4 -m verify ppl ...

Rank 0 writes the run's folder and speaks; the others run their windows and hand over what they found. On each
machine one process reads the model and sends every tensor to the others, so that all of them take the same
tensors in the same order. nccl between GPUs, gloo between CPUs and for everything small.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from verify.machine.errors import UsageError
from verify.model.stream import Share

T = TypeVar("T")
# How long the others wait for one that reads a slow disk.
_PATIENCE = timedelta(hours=2)


class Ranks:
    """This process among `size`; alone it is rank 0 of 1, and nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self) -> Share | None:
        """How the processes of one machine share their reading; None in a process alone."""
        if self.size == 1:
            return None
        host = socket.gethostname()
        hosts = self.everyones(host)
        # Every process has to take part in making every group.
        groups = {
            name: dist.new_group([r for r, h in enumerate(hosts) if h == name], timeout=_PATIENCE)
            for name in sorted(set(hosts))
        }
        return _OneReader(groups[host], hosts.index(host), self.rank)

    def everyones(self, own: T) -> list[T]:
        """What each rank gives, by rank."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        return found

    def any(self, own: bool) -> bool:
        """Whether any rank says so. Every rank has to ask."""
        return any(self.everyones(own))

    def of_leader(self, own: T) -> T:
        """What rank 0 gives."""
        if self.size == 1:
            return own
        box: list[Any] = [own]
        dist.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found

    def agree(self, what: dict[str, Any]) -> None:
        """Raises UsageError, in every process, where one sees something else than rank 0 does."""
        everyones = self.everyones(what)
        for rank, other in enumerate(everyones):
            for key, value in everyones[0].items():
                if other.get(key) != value:
                    seen = f"{str(other.get(key))[:40]} instead of {str(value)[:40]}"
                    raise UsageError(f"rank {rank} of {self.size} has another {key} than rank 0: {seen}")

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def ranks_of_environment() -> Ranks:
    """The processes that torchrun started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    return Ranks(dist.get_rank(), size)


def local_device() -> torch.device:
    """The GPU of this process where there are several processes a machine."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class _OneReader:
    """`Share` of the processes of one machine: rank `reader` reads."""

    def __init__(self, group: Any, reader: int, rank: int) -> None:
        self.group, self.reader, self.reads = group, reader, rank == reader

    def spread(self, stored: torch.Tensor) -> None:
        if stored.numel():
            dist.broadcast(stored, src=self.reader, group=self.group)

    def union(self, named: Sequence[int]) -> list[int]:
        everyones: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyones, list(named), group=self.group)
        return sorted(set().union(*everyones))
