"""N replicas behind one door: dispatch, bounded in-flight work, deadlines, replacing the dead.

The protocol of every stage method: it answers with a small header, which the driver reads, and
tables, of which the driver only ever holds references. A streaming method yields header, table,
header, table ...

Ray's own restarts are off: a replacement gets the newest weights and a new epoch from here, and
an answer is only ever awaited from the incarnation that was asked, so a late answer of an older
one reaches nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import RayError

from tip_ray.contract.errors import ObjectsLostError, ReplicaError, RunFailedError, TipRayError
from tip_ray.runtime.replica import CreateActor, Replica, classify, kill
from tip_ray.runtime.tasks import next_ref, next_ref_afar, together, value_of, within
from tip_ray.runtime.weights import WeightVersion

FAILURES = (RayError, TimeoutError)
START_S = 180.0  # at least so long for a new process, which may import for long on a busy machine


class OnEvent(Protocol):
    """Told of faults and recoveries; must not block."""

    def __call__(self, kind: str, **facts: Any) -> None: ...


@dataclass(frozen=True)
class Answer:
    """What one call gave: the header's value and references to the tables behind it."""

    header: Any
    refs: tuple[Any, ...]
    node_id: str  # of the replica, where the tables lie


class Pool:
    """Replicas of one stage.

    Args:
        create: makes the actor of a replica index, in its placement bundle.
        in_flight: calls a replica may hold at once; the second waits in its queue.
        timeout_s: a call, or the next item of a stream, that takes longer costs the replica its
            life.
        max_tries: of one piece of work, and of making one replica.
    """

    def __init__(
        self,
        name: str,
        create: CreateActor,
        size: int,
        *,
        timeout_s: float,
        max_tries: int,
        on_event: OnEvent,
        in_flight: int = 1,
    ) -> None:
        self.name = name
        self._create, self._size, self._limit = create, size, in_flight
        self._timeout_s, self._max_tries, self._on_event = timeout_s, max_tries, on_event
        self._replicas: list[Replica] = []
        self._weights: WeightVersion | None = None
        self._changed = asyncio.Condition()
        self._renewals: dict[int, asyncio.Task[None]] = {}  # by replica index
        self._broken: TipRayError | None = None  # a replica could not be replaced

    def __len__(self) -> int:
        return self._size

    @property
    def weight_versions(self) -> list[int]:
        """The version each replica last adopted."""
        return [replica.weight_version for replica in self._replicas]

    async def start(self) -> None:
        """Make all replicas and wait until each answers.

        Raises:
            RunFailedError: one could not be made; or the actor's own TipRayError.
        """
        self._replicas = [Replica(index, 1, self._create(index)) for index in range(self._size)]
        await together(*(self._bring_up(replica) for replica in self._replicas))

    async def call(self, method: str, *args: Any, returns: int) -> Answer:
        """Run `method` on a free replica; on a replica's failure, on another.

        Args:
            returns: objects the method returns: the header and `returns - 1` tables.

        Raises:
            RunFailedError: `max_tries` replicas failed at it; or the actor's own TipRayError.
            ObjectsLostError: some of `args` are gone.
            ReplicaError: a replacement's weights are gone, and must be published again.
        """
        for attempt in range(1, self._max_tries + 1):
            async with self._lease() as replica:
                remote = getattr(replica.actor, method).options(num_returns=returns)
                refs = remote.remote(*args)
                refs = refs if isinstance(refs, list) else [refs]
                try:
                    header = await within(self._timeout_s, value_of(refs[0]))
                    return Answer(header, tuple(refs[1:]), replica.node_id)
                except FAILURES as error:
                    failure = self._retriable(error, replica)
            await self._after_failure(replica, failure, method, attempt)
        raise AssertionError("unreachable: the last failed attempt raises")

    async def stream(
        self, method: str, remaining: Callable[[], tuple[Any, ...] | None]
    ) -> AsyncIterator[Answer]:
        """Yield (header, table) pairs of a streaming `method` as they come.

        Args:
            remaining: the arguments for the work not yet received, None if there is none; asked
                anew before each try, so that what came before a failure is not made twice.

        Raises:
            RunFailedError: as `call`.
        """
        for attempt in range(1, self._max_tries + 1):
            args = remaining()
            if args is None:
                return
            async with self._lease() as replica:
                remote = getattr(replica.actor, method).options(num_returns="streaming")
                items = aiter(remote.remote(*args))
                try:
                    async for answer in self._pairs(items, replica):
                        yield answer
                    return
                except FAILURES as error:
                    failure = self._retriable(error, replica)
            await self._after_failure(replica, failure, method, attempt)

    async def adopt(self, weights: WeightVersion) -> None:
        """Load `weights` into every replica, each as soon as it holds no other work.

        Raises:
            ObjectsLostError: they are gone, and must be published again.
        """
        self._weights = weights
        await together(*(self._adopt_one(index, weights) for index in range(self._size)))

    def close(self) -> None:
        """End all replicas; the pool is not used afterwards."""
        for renewal in self._renewals.values():
            renewal.cancel()
        for replica in self._replicas:
            kill(replica.actor)
        self._replicas = []

    async def _pairs(self, items: Any, replica: Replica) -> AsyncIterator[Answer]:
        while True:
            try:
                header_ref = await within(self._timeout_s, next_ref(items))
                header = await within(self._timeout_s, value_of(header_ref))
                table_ref = await within(self._timeout_s, next_ref_afar(items))
            except StopAsyncIteration:
                return
            yield Answer(header, (table_ref,), replica.node_id)
            # What ends the stream remembers this frame, and may do so for long.
            del table_ref

    async def _adopt_one(self, index: int, weights: WeightVersion) -> None:
        async with self._lease(index, exclusive=True) as replica:
            try:
                await self._load(replica, weights)
                return
            except FAILURES as error:
                failure = self._retriable(error, replica)
        await self._replace(replica, failure)  # which gives it the newest weights

    async def _load(self, replica: Replica, weights: WeightVersion) -> None:
        if replica.weight_version == weights.version:
            return
        ref = replica.actor.load_weights.remote(weights.version, *weights.group_refs)
        await within(self._timeout_s, value_of(ref))
        replica.weight_version, replica.weightless = weights.version, False

    @asynccontextmanager
    async def _lease(
        self, index: int | None = None, *, exclusive: bool = False
    ) -> AsyncIterator[Replica]:
        """A replica with room (an empty one for `exclusive`); waits until there is one."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._broken is not None or self._pick(index, exclusive) is not None
            )
            if self._broken is not None:
                raise self._broken
            replica = self._pick(index, exclusive)
            assert replica is not None
            replica.in_flight += 1
            replica.exclusive = exclusive
        try:
            yield replica
        finally:
            replica.in_flight -= 1
            replica.exclusive = False
            await self._notify()

    def _pick(self, index: int | None, exclusive: bool) -> Replica | None:
        limit = 1 if exclusive else self._limit
        free = [
            replica
            for replica in self._replicas
            if not replica.lost
            and not replica.exclusive
            and (exclusive or not replica.weightless)
            and replica.in_flight < limit
            and index in (None, replica.index)
        ]
        return min(free, key=lambda replica: replica.in_flight, default=None)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _retriable(self, error: BaseException, replica: Replica) -> ReplicaError:
        """The failure if another try may help; anything else is raised."""
        failure = classify(error, f"{self.name}[{replica.index}]")
        if not isinstance(failure, ReplicaError):
            raise failure from error
        return failure

    async def _after_failure(
        self, replica: Replica, failure: ReplicaError, method: str, attempt: int
    ) -> None:
        if attempt == self._max_tries:
            raise RunFailedError(f"{method} failed {attempt} times, last on {failure}")
        await self._replace(replica, failure)

    async def _replace(self, old: Replica, failure: ReplicaError) -> None:
        """Wait until a new incarnation is in the place of `old`.

        Whoever waits may be cancelled; the replacement goes on, since others need it.
        """
        if self._replicas[old.index] is not old:
            return
        if not old.lost:
            old.lost = True
            renewal = asyncio.create_task(self._renew(old, failure))
            renewal.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._renewals[old.index] = renewal
        await asyncio.shield(self._renewals[old.index])
        if self._replicas[old.index].weightless:
            raise ReplicaError(f"{self.name}[{old.index}]: the weights it needs are gone")

    async def _renew(self, old: Replica, failure: ReplicaError) -> None:
        began = time.monotonic()
        facts = {"pool": self.name, "replica": old.index}
        self._on_event("replica_lost", **facts, epoch=old.epoch, reason=str(failure))
        kill(old.actor)
        new = Replica(old.index, old.epoch + 1, self._create(old.index))
        try:
            await self._bring_up(new)
        except BaseException as error:
            kill(new.actor)
            self._broken = error if isinstance(error, TipRayError) else None
            await self._notify()
            raise
        self._replicas[old.index] = new
        seconds = time.monotonic() - began
        self._on_event("replica_recovered", **facts, epoch=new.epoch, seconds=seconds)
        await self._notify()

    async def _bring_up(self, replica: Replica) -> None:
        """Wait until a new actor answers and holds the newest weights; retry its creation.

        Where the weights are gone it is left without any.
        """
        for attempt in range(1, self._max_tries + 1):
            try:
                answer = value_of(replica.actor.node_id.remote())
                limit_s = max(self._timeout_s, START_S)
                replica.node_id = await within(limit_s, answer)
                if self._weights is not None:
                    await self._load(replica, self._weights)
                return
            except FAILURES as error:
                try:
                    failure = self._retriable(error, replica)
                except ObjectsLostError:
                    replica.weightless = True
                    return
                if attempt == self._max_tries:
                    raise RunFailedError(f"cannot start {failure}") from error
                kill(replica.actor)
                replica.actor, replica.weight_version = self._create(replica.index), 0
