"""Ranks that only work together: every call goes to all of them, one failure fails the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tip_ray.contract.errors import ObjectsLostError, ReplicaError
from tip_ray.runtime.pool import FAILURES, START_S
from tip_ray.runtime.replica import CreateActor, classify, kill
from tip_ray.runtime.tasks import next_ref, next_ref_afar, together, value_of, within

_START_TRIES = 3


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
        """Make all ranks and let them meet at an address of rank 0; a few tries.

        Raises:
            ReplicaError: a rank died or hung each time.
            TipRayError: whatever a rank raised of its own.
        """
        for last in (False,) * (_START_TRIES - 1) + (True,):
            try:
                await self._start_once()
                return
            except ReplicaError:
                self.close()
                if last:
                    raise

    async def _start_once(self) -> None:
        self._actors = [self._create(rank) for rank in range(self._size)]
        first = self._actors[0]
        address = (first.node_address.remote(), first.open_port.remote())
        limit_s = max(self._timeout_s, START_S)
        host, port = await self._guard(together(*map(value_of, address)), "start", limit_s)
        joining = [actor.join.remote(host, port, self._size) for actor in self._actors]
        await self._guard(together(*map(value_of, joining)), "join", limit_s)

    async def call(self, method: str, args: Sequence[Sequence[Any]]) -> list[Any]:
        """`method(*args[rank])` on every rank at once; the answers in rank order.

        Raises:
            ReplicaError: a rank died, hung, or its tables were lost, for which the others would
                wait in vain; the gang must be started again.
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
        pairs = []
        while True:
            try:
                header = await (await next_ref(stream))
            except StopAsyncIteration:
                return pairs
            pairs.append((header, await next_ref_afar(stream)))

    async def _guard(self, work: Any, method: str, limit_s: float | None = None) -> Any:
        try:
            return await within(limit_s or self._timeout_s, work)
        except FAILURES as error:
            failure = classify(error, f"{self.name}.{method}")
            if isinstance(failure, ObjectsLostError):
                failure = ReplicaError(str(failure))
            raise failure from error
