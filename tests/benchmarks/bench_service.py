"""Latency of `tip-ray serve`: 500 requests, 20 at a time, over the loopback.

A root of 50 runs, one of them 10,000 steps long, is read by a service that is a process of its own;
this process loads it, so both share the cores. The last rows are taken while a writer replaces the
long run's status and newest metrics part ten times a second, as fast a driver as there is.

    python -m tests.benchmarks.bench_service --output outputs/bench
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from tests.benchmarks.common import print_table, write_json
from tests.runs_made import made_metrics, made_run, made_status
from tests.service.api_served import write_metrics
from tip_ray.contract.run_state import RunState
from tip_ray.control.run_directory import RunDirectory
from tip_ray.service.api import ARROW

RUNS, LONG_STEPS, STEPS = 50, 10_000, 40
REQUESTS, AT_A_TIME = 500, 20
LONG = "run-00"
WRITE_EVERY_S = 0.1

IDS = [f"run-{number:02d}" for number in range(RUNS)]
STATUS = [path for run_id in IDS for path in (f"/api/runs/{run_id}", "/api/runs")]
SCENARIOS: dict[str, tuple[Sequence[str], str]] = {
    "/api/runs and /api/runs/{id} by turns": (STATUS, "*/*"),
    "/api/runs": (["/api/runs"], "*/*"),
    "/api/runs/{id}": ([f"/api/runs/{run_id}" for run_id in IDS], "*/*"),
    "metrics of 10,000 steps, 500 points": ([f"/api/runs/{LONG}/metrics?max_points=500"], "*/*"),
    "metrics of 10,000 steps, Arrow, whole": ([f"/api/runs/{LONG}/metrics"], ARROW),
    "/metrics (Prometheus)": (["/metrics"], "*/*"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tip-bench-") as root:
        long_run = make_runs(Path(root))
        with serving(root) as (url, token):
            figures = [measure(url, token, name) for name in SCENARIOS]
            with written(long_run):
                busy = list(SCENARIOS)[:4]
                figures += [measure(url, token, name, " while written") for name in busy]
    write_json(options.output, "service", figures, requests=REQUESTS, at_a_time=AT_A_TIME)
    print_table(figures)
    return 0


def make_runs(root: Path) -> RunDirectory:
    """The long run, which goes on; the others have ended."""
    for run_id in IDS:
        directory = made_run(root, run_id, steps=1)
        steps = LONG_STEPS if run_id == LONG else STEPS
        (root / run_id / "metrics" / "step-00000001.parquet").unlink()
        write_metrics(root / run_id, steps)
        if run_id == LONG:
            long_run = directory
    write_status(long_run, LONG_STEPS)
    return long_run


def write_status(run: RunDirectory, step: int) -> None:
    run.write_status(made_status(LONG, state=RunState.RUNNING, step=step, steps=2 * LONG_STEPS))


@contextlib.contextmanager
def serving(root: str) -> Iterator[tuple[str, str]]:
    """(URL, token) of `tip-ray serve`."""
    command = [sys.executable, "-m", "tip_ray.cli", "serve", "--run-root", root, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0], process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@contextlib.contextmanager
def written(run: RunDirectory) -> Iterator[None]:
    """A step more every WRITE_EVERY_S."""
    ended = threading.Event()

    def write() -> None:
        for step in itertools.count(LONG_STEPS + 1):
            run.append_metrics(made_metrics(step))
            write_status(run, step)
            if ended.wait(WRITE_EVERY_S):
                return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def measure(url: str, token: str, name: str, suffix: str = "") -> dict[str, Any]:
    """One row of the table."""
    paths, accept = SCENARIOS[name]
    headers = {"Authorization": f"Bearer {token}", "Accept": accept}
    (first_s,), _, _ = asyncio.run(load(url, paths[:1], headers, 1))
    seconds, nbytes, wall_s = asyncio.run(load(url, paths, headers, REQUESTS))
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1000
    return {
        "requests": name + suffix,
        "first ms": first_s * 1000,
        "p50 ms": p50,
        "p95 ms": p95,
        "p99 ms": p99,
        "largest ms": max(seconds) * 1000,
        "a second": REQUESTS / wall_s,
        "KiB each": nbytes / REQUESTS / 1024,
    }


async def load(
    url: str, paths: Sequence[str], headers: dict[str, str], count: int
) -> tuple[list[float], int, float]:
    """(seconds of each request, bytes of all, wall seconds), AT_A_TIME in flight."""
    seconds: list[float] = []
    nbytes = 0
    left = iter(list(itertools.islice(itertools.cycle(paths), count)))
    connector = aiohttp.TCPConnector(limit=AT_A_TIME)
    async with aiohttp.ClientSession(url, headers=headers, connector=connector) as session:

        async def work() -> None:
            nonlocal nbytes
            for path in left:
                began = time.perf_counter()
                async with session.get(path) as answer:
                    body = await answer.read()
                    assert answer.status == 200, path
                nbytes += len(body)
                seconds.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(min(AT_A_TIME, count))))
        return seconds, nbytes, time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
