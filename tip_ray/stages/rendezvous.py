"""Where the learner's ranks meet: a store on rank 0's node, then one process group over it."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

# How long a collective waits for the slowest rank: its rows, or a slow consumer of the weights.
GROUP_TIMEOUT = timedelta(minutes=30)


def open_store() -> dist.TCPStore:
    """A store on a free port of this node, at once: no other process can take the port first."""
    return dist.TCPStore(
        "localhost",  # for this process's own connection; the store listens on every interface
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=GROUP_TIMEOUT,
    )


def meet(store: dist.Store, rank: int, world_size: int, device: torch.device) -> None:
    """Make the process group: NCCL on GPUs, gloo on CPUs. Collective."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=GROUP_TIMEOUT,
    )


def part() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
