"""Ranks that only work together: every call goes to all of them, one failure fails the call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from tip_ray.runtime.pool import FAILURES
from tip_ray.runtime.replica import CreateActor, classify, kill
from tip_ray.runtime.tasks import together, value_of


class Gang:
    """The learner's ranks.

    Args:
        create: makes the actor of a rank, in its placement bundle.
        timeout_s: a collective call that takes longer fails.
    """

    def __init__(self, name: str, create: CreateActor, size: int, *, timeout_s: float) -> None:
        self.name = name
        self._create, self._size, self._timeout_s = create, size, timeout_s
        self._actors: list[Any] = []

    def __len__(self) -> int:
        return self._size

    async def start(self) -> None:
        """Make all ranks and let them meet at an address of rank 0."""
        self._actors = [self._create(rank) for rank in range(self._size)]
        first = self._actors[0]
        address = (first.node_address.remote(), first.open_port.remote())
        host, port = await self._guard(together(*map(value_of, address)), "start")
        await self.call_same("join", host, port, self._size)

    async def call(self, method: str, args: Sequence[Sequence[Any]]) -> list[Any]:
        """`method(*args[rank])` on every rank at once; the answers in rank order.

        Raises:
            ReplicaError: a rank died or hung; the gang must be started again.
            TipRayError: whatever a rank raised of its own.
        """
        refs = [
            getattr(actor, method).remote(*own)
            for actor, own in zip(self._actors, args, strict=True)
        ]
        return list(await self._guard(together(*map(value_of, refs)), method))

    async def call_same(self, method: str, *args: Any) -> list[Any]:
        """`method(*args)` on every rank at once."""
        return await self.call(method, [args] * self._size)

    async def stream(self, method: str, *args: Any) -> list[tuple[Any, Any]]:
        """All (header, reference) pairs that rank 0 yields while every rank runs `method`.

        Raises:
            ReplicaError, TipRayError: as `call`.
        """
        streams = [
            getattr(actor, method).options(num_returns="streaming").remote(*args)
            for actor in self._actors
        ]
        pairs_of_rank = await self._guard(together(*map(self._drain, streams)), method)
        return list(pairs_of_rank[0])

    def close(self) -> None:
        """End all ranks."""
        for actor in self._actors:
            kill(actor)
        self._actors = []

    async def _drain(self, stream: Any) -> list[tuple[Any, Any]]:
        return [(await header_ref, await anext(stream)) async for header_ref in stream]

    async def _guard(self, work: Any, method: str) -> Any:
        try:
            return await asyncio.wait_for(work, self._timeout_s)
        except FAILURES as error:
            raise classify(error, f"{self.name}.{method}") from error
