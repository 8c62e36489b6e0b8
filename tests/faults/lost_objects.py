"""Two nodes, one of which goes: tables and weights that went with it. `test_pool_faults` runs it.

A process of its own: pytest's is connected to another cluster.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.faults.nodes import Nodes
from tip_ray.contract.errors import ObjectsLostError, ReplicaError
from tip_ray.runtime.gang import Gang
from tip_ray.runtime.pool import Pool
from tip_ray.runtime.replica import actor_class
from tip_ray.runtime.weights import WeightGroup, WeightVersion


class Worker:
    """Makes tables, reads tables, holds weights."""

    def __init__(self) -> None:
        self.version = 0

    def load_weights(self, version: int, *groups: WeightGroup) -> int:
        self.version = sum(group.nbytes > 0 for group in groups) and version
        return self.version

    def make(self) -> tuple[int, Any]:
        return 1, np.ones(10**5)

    def read(self, table: Any) -> tuple[float]:
        return float(table.sum())

    def stream(self, count: int) -> Iterator[Any]:
        for number in range(count):
            yield number
            yield np.full(10**5, number)

    def weights(self) -> WeightGroup:
        return WeightGroup.pack({"w": torch.ones(10**5)})

    def held(self) -> int:
        return self.version

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    # As a gang's rank
    def open_port(self) -> int:
        return 1

    def join(self, host: str, port: int, size: int) -> None:
        pass


def on(node: str) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return actor_class(Worker).options(num_cpus=0, scheduling_strategy=strategy)


def ignored(kind: str, **facts: Any) -> None:
    """The outcome of each call says what happened."""


def pool(node: str, then: str | None = None) -> Pool:
    """One replica on `node`; replacements on `then`."""
    homes = itertools.chain([node], itertools.repeat(then or node))
    return Pool(
        "worker",
        lambda _: on(next(homes)).remote(),
        1,
        timeout_s=60,
        max_tries=3,
        on_event=ignored,
    )


async def go(nodes: Nodes) -> None:
    ids = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")]
    stays, goes, moves = pool(ids[0]), pool(ids[1]), pool(ids[1], then=ids[0])
    gang = Gang("gang", lambda _: on(ids[0]).remote(), 2, timeout_s=60)
    await asyncio.gather(stays.start(), goes.start(), moves.start(), gang.start())
    await tables_stay(goes, gang, ids)
    table = (await goes.call("make", returns=2)).refs[0]
    assert (await stays.call("read", table, returns=1)).header == 10**5
    heavy = on(ids[1]).remote()
    lost = WeightVersion(3, (heavy.weights.remote(),), 1)
    await moves.adopt(lost)
    # Another table, of which nothing was copied to the node that stays.
    table = (await goes.call("make", returns=2)).refs[0]
    nodes.lose(ids[1])
    await lost_tables(stays, gang, table)
    await lost_weights(moves)


async def tables_stay(goes: Pool, gang: Gang, ids: list[str]) -> None:
    """What a stream yields is waited for, and not brought to the driver's node."""
    work = iter([(3,), None])
    from_pool = [one.refs[0] async for one in goes.stream("stream", lambda: next(work))]
    from_gang = [ref for _, ref in await gang.stream("stream", 3)]
    for refs, home in ((from_pool, ids[1]), (from_gang, ids[0])):
        places = ray.experimental.get_object_locations(refs)
        assert [places[ref]["node_ids"] for ref in refs] == [[home]] * 3, places


async def lost_tables(stays: Pool, gang: Gang, table: Any) -> None:
    """No replica is blamed; a gang starts anew, since its other ranks wait in vain."""
    try:
        await stays.call("read", table, returns=1)
    except ObjectsLostError:
        pass
    else:
        raise AssertionError("a lost table was read")
    assert (await stays.call("held", returns=1)).header == 0  # the same replica
    try:
        await gang.call("read", [[table], [np.ones(1)]])
    except ReplicaError:
        pass
    else:
        raise AssertionError("a lost table was read by a gang")


async def lost_weights(moves: Pool) -> None:
    """A replacement waits for newer weights, and whoever asks is told to publish some."""
    try:
        await moves.call("die", returns=1)  # it outlives its node for a while
    except ReplicaError:
        pass
    else:
        raise AssertionError("the weights were there")
    group = WeightGroup.pack({"w": torch.ones(3)})
    await moves.adopt(WeightVersion(4, (ray.put(group),), group.nbytes))
    assert (await moves.call("held", returns=1)).header == 4


if __name__ == "__main__":
    here = Nodes(2)
    ray.init(address=here.address, log_to_driver=False)
    try:
        asyncio.run(go(here))
    finally:
        ray.shutdown()
        here.close()
    print("good")  # noqa: T201
