"""The pool on real Ray actors that die, hang, err and stream."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from tip_ray.contract.errors import DataError, ObjectsLostError, RunFailedError
from tip_ray.runtime.pool import Pool
from tip_ray.runtime.replica import actor_class
from tip_ray.runtime.weights import WeightGroup, WeightVersion

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Worker:
    """Does what each test asks; `marks` is a directory that outlives a replica."""

    def __init__(self, marks: Path) -> None:
        self.marks, self.version, self.busy = marks, 0, False

    def load_weights(self, version: int, *groups: WeightGroup) -> int:
        assert not self.busy
        self.version = version
        self.weights = [tensor for group in groups for _, tensor in group.tensors()]
        return version

    def once(self, name: str) -> bool:
        try:
            (self.marks / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def answer(self, value: int) -> tuple[int, int]:
        return value, value * 10

    def pid(self) -> int:
        return os.getpid()

    def loaded(self) -> tuple[int, float]:
        return self.version, float(sum(tensor.sum() for tensor in self.weights))

    def die_once(self, value: int) -> int:
        if self.once("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    def hang_once(self, value: int) -> int:
        if self.once("hung"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return value

    def always_breaks(self) -> int:
        raise RuntimeError("the device is lost")

    def poisonous(self) -> int:
        raise DataError("row 3: not a number")

    def count(self, items: list[int]) -> Iterator[Any]:
        self.busy = True
        for item in items:
            if item == 3 and self.once("streamed"):
                os.kill(os.getpid(), signal.SIGKILL)
            yield item
            if item == 4 and self.once("between"):
                time.sleep(0.5)  # so that the header arrives
                os.kill(os.getpid(), signal.SIGKILL)
            yield np.full(4, item)
        self.busy = False

    def sleep(self, seconds: float) -> int:
        self.busy = True
        time.sleep(seconds)
        self.busy = False
        return self.version


class Events(list[tuple[str, dict[str, Any]]]):
    def __call__(self, kind: str, **facts: Any) -> None:
        self.append((kind, facts))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self]


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def make_pool(tmp_path: Path, events: Events) -> Iterator[Any]:
    pools: list[Pool] = []

    def make(size: int = 1, **options: Any) -> Pool:
        remote = actor_class(Worker).options(num_cpus=0)
        chosen = {"timeout_s": 30.0, "max_tries": 3, **options}
        pool = Pool("worker", lambda _: remote.remote(tmp_path), size, on_event=events, **chosen)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def weights(version: int, value: float) -> WeightVersion:
    group = WeightGroup.pack({"w": torch.full((3,), value)})
    return WeightVersion(version, (ray.put(group),), group.nbytes)


def test_a_call_gives_the_header_and_references(make_pool: Any) -> None:
    async def go() -> None:
        pool = make_pool(2)
        await pool.start()
        answers = await asyncio.gather(*(pool.call("answer", i, returns=2) for i in range(6)))
        assert [answer.header for answer in answers] == list(range(6))
        assert [ray.get(answer.refs[0]) for answer in answers] == [i * 10 for i in range(6)]
        assert all(answer.node_id for answer in answers)

    asyncio.run(go())


def test_a_killed_replica_is_replaced_with_the_newest_weights(
    make_pool: Any, events: Events
) -> None:
    async def go() -> None:
        pool = make_pool()
        await pool.start()
        await pool.adopt(weights(4, 2.0))
        before = (await pool.call("pid", returns=1)).header
        assert (await pool.call("die_once", 7, returns=1)).header == 7
        assert (await pool.call("pid", returns=1)).header != before
        assert (await pool.call("loaded", returns=1)).header == (4, 6.0)
        assert events.kinds == ["replica_lost", "replica_recovered"]
        assert events[1][1]["epoch"] == 2

    asyncio.run(go())


def test_a_hung_replica_costs_its_life_at_the_deadline(make_pool: Any, events: Events) -> None:
    async def go() -> None:
        pool = make_pool(timeout_s=4.0)
        await pool.start()
        assert (await pool.call("hang_once", 5, returns=1)).header == 5
        assert "no answer in time" in events[0][1]["reason"]

    asyncio.run(go())


def test_a_machine_error_that_stays_fails_after_max_tries(make_pool: Any, events: Events) -> None:
    async def go() -> None:
        pool = make_pool(max_tries=2)
        await pool.start()
        with pytest.raises(RunFailedError, match=r"always_breaks failed 2 times.*device is lost"):
            await pool.call("always_breaks", returns=1)
        assert events.kinds.count("replica_recovered") == 1

    asyncio.run(go())


def test_a_data_error_is_not_retried(make_pool: Any, events: Events) -> None:
    async def go() -> None:
        pool = make_pool()
        await pool.start()
        with pytest.raises(DataError, match="row 3"):
            await pool.call("poisonous", returns=1)
        assert events == []

    asyncio.run(go())


def test_an_argument_that_died_with_its_maker_is_no_replicas_fault(
    make_pool: Any, events: Events, tmp_path: Path
) -> None:
    maker = actor_class(Worker).options(num_cpus=0).remote(tmp_path)
    argument = maker.die_once.remote(1)

    async def go() -> None:
        pool = make_pool()
        await pool.start()
        with pytest.raises(ObjectsLostError, match="worker"):
            await pool.call("answer", argument, returns=2)
        assert events == []

    asyncio.run(go())


def test_a_stream_goes_on_after_a_death_without_repeating(make_pool: Any) -> None:
    async def go() -> None:
        pool = make_pool()
        await pool.start()
        received: list[int] = []

        def remaining() -> tuple[list[int]] | None:
            left = [item for item in range(6) if item not in received]
            return (left,) if left else None

        async for answer in pool.stream("count", remaining):
            received.append(answer.header)
            assert ray.get(answer.refs[0])[0] == answer.header
        assert received == list(range(6))

    asyncio.run(go())


def test_weights_are_adopted_between_calls_never_in_one(make_pool: Any) -> None:
    async def go() -> None:
        pool = make_pool(2)
        await pool.start()
        calls = [asyncio.create_task(pool.call("sleep", 0.3, returns=1)) for _ in range(4)]
        await asyncio.sleep(0.05)
        await pool.adopt(weights(1, 1.0))
        assert pool.weight_versions == [1, 1]
        versions = [(await call).header for call in calls]
        assert set(versions) <= {0, 1}
        assert (await pool.call("sleep", 0.0, returns=1)).header == 1

    asyncio.run(go())
