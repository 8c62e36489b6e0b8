"""Processes that are stopped, waiters that go, nodes that take tables and weights along."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tip_ray.contract.errors import ReplicaError, RunFailedError
from tip_ray.runtime.gang import Gang
from tip_ray.runtime.pool import Pool
from tip_ray.runtime.replica import actor_class
from tip_ray.runtime.tasks import within

ROOT = Path(__file__).parents[2]
Events = list[tuple[str, dict[str, Any]]]


class Worker:
    """`marks` is a directory that outlives a replica."""

    def __init__(self, marks: Path, *, good: bool = True) -> None:
        if not good:
            raise RuntimeError("no memory")
        self.marks = marks

    def pid(self) -> int:
        return os.getpid()

    def stop_once(self) -> int:
        try:
            (self.marks / "stopped").write_text(str(os.getpid()))
            (self.marks / "once").touch(exist_ok=False)
        except FileExistsError:
            return os.getpid()
        os.kill(os.getpid(), signal.SIGSTOP)
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def open_port(self) -> int:
        return 1

    def join(self, host: str, port: int, size: int) -> None:
        pass


@pytest.fixture
def events() -> Events:
    return []


@pytest.fixture
def make_pool(tmp_path: Path, events: Events, ray_cluster: None) -> Iterator[Any]:
    pools: list[Pool] = []

    def make(good: Any = lambda: True) -> Pool:
        remote = actor_class(Worker).options(num_cpus=0)
        pool = Pool(
            "worker",
            lambda _: remote.remote(tmp_path, good=good()),
            1,
            timeout_s=5,
            max_tries=3,
            on_event=lambda kind, **facts: events.append((kind, facts)),
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def test_a_stopped_replica_is_replaced_and_its_process_gone(make_pool: Any) -> None:
    async def go() -> tuple[int, int]:
        pool = make_pool()
        await pool.start()
        first = (await pool.call("pid", returns=1)).header
        return first, (await pool.call("stop_once", returns=1)).header

    first, second = asyncio.run(go())
    assert first != second
    psutil.wait_procs([psutil.Process(first)] if psutil.pid_exists(first) else [], timeout=30)
    assert not psutil.pid_exists(first)


def test_a_stopped_rank_fails_the_gang_which_starts_again(
    ray_cluster: None, tmp_path: Path
) -> None:
    async def go() -> None:
        remote = actor_class(Worker).options(num_cpus=0)
        gang = Gang("gang", lambda _: remote.remote(tmp_path), 2, timeout_s=5)
        await gang.start()
        stopped = await gang.call_same("pid")
        with pytest.raises(ReplicaError, match="no answer in time"):
            await gang.call_same("stop_once")
        gang.close()
        await gang.start()
        assert not set(await gang.call_same("pid")) & set(stopped)
        gang.close()
        first = [psutil.Process(pid) for pid in stopped if psutil.pid_exists(pid)]
        _, alive = psutil.wait_procs(first, timeout=30)
        assert alive == []

    asyncio.run(go())


def test_a_replacement_goes_on_when_nobody_waits_for_it(make_pool: Any, events: Events) -> None:
    async def go() -> None:
        pool = make_pool()
        await pool.start()
        waiter = asyncio.create_task(pool.call("die", returns=1))
        while not events:
            await asyncio.sleep(0.01)
        waiter.cancel()
        assert (await within(60, pool.call("pid", returns=1))).header
        assert [kind for kind, _ in events] == ["replica_lost", "replica_recovered"]

    asyncio.run(go())


def test_whoever_comes_after_a_failed_replacement_is_told(make_pool: Any, events: Events) -> None:
    tries = iter([True, *[False] * 9])

    async def go() -> None:
        pool = make_pool(lambda: next(tries))
        await pool.start()
        waiter = asyncio.create_task(pool.call("die", returns=1))
        while not events:
            await asyncio.sleep(0.01)
        waiter.cancel()
        with pytest.raises(RunFailedError, match="cannot start worker"):
            await within(60, pool.call("pid", returns=1))

    asyncio.run(go())


def test_what_a_node_takes_along_is_no_replicas_fault() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.lost_objects"],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.endswith("good\n"), done.stderr[-3000:]
