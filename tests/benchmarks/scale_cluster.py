"""A Ray cluster of several nodes on this machine, a worker group a pool, and who watches it.

    head       the driver; no CPUs
    rollout    one node with all rollout replicas
    teacher    two nodes with half of the teacher replicas each: SCORES, TARGETS and cut
    learner    one node with all ranks

So every hop of the tables crosses nodes, as in deploy/'s worker groups; "the network" is this
machine's memory.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import internal_api
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
from ray.cluster_utils import Cluster

GIB = 1 << 30
TEACHER_NODES = 2
_CPUS_A_NODE = 64  # logical: Ray keeps so many idle workers for the next step's cuts
_LEAST_FREE_BYTES = 1.2 * GIB
_LOOK_EVERY_S, _WEIGH_EVERY_S = 0.1, 1.0
_SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    # What is reported is all that lies in a store, copies from other nodes included.
    "RAY_scheduler_report_pinned_bytes_only": "0",
    # Hundreds of processes start on few cores.
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_worker_maximum_startup_concurrency": "3",
}


@dataclass(frozen=True)
class Stores:
    """GiB of each node's object store."""

    rollout: float
    teacher: float
    learner: float
    head: float = 0.5


@contextmanager
def cluster(replicas: Mapping[str, int], stores: Stores) -> Iterator[str]:
    """The address of a cluster with room for `replicas` by pool; this process is connected."""
    directory = tempfile.mkdtemp(prefix="tip-sc-")
    before = {name: os.environ.get(name) for name in (*_SETTINGS, "RAY_TMPDIR")}
    os.environ.update(_SETTINGS, RAY_TMPDIR=directory)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _bytes(stores.head)}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        groups = [("rollout", 1, stores.rollout), ("teacher", TEACHER_NODES, stores.teacher)]
        for pool, count, gib in (*groups, ("learner", 1, stores.learner)):
            for _ in range(count):
                nodes.add_node(
                    num_cpus=_CPUS_A_NODE,
                    resources={pool: -(-replicas[pool] // count)},
                    object_store_memory=_bytes(gib),
                )
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield str(nodes.address)
    finally:
        ray.shutdown()
        nodes.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(directory, ignore_errors=True)


def _bytes(gib: float) -> int:
    return int(gib * GIB)


def stored() -> dict[str, int]:
    """Sums over all nodes since the cluster began: bytes made in stores, copies included, spilled.

    Asks every worker: not for the middle of a step.
    """
    totals = {"created_bytes": 0, "spilled_bytes": 0}
    for node in ray.nodes():
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        stats = internal_api.node_stats(*address, include_memory_info=False).store_stats
        totals["created_bytes"] += stats.cumulative_created_bytes
        totals["spilled_bytes"] += stats.spilled_bytes_total
    return totals


def system_processes() -> list[psutil.Process]:
    """The raylets and the GCS, which this process has started."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name() in ("raylet", "gcs_server")]


@dataclass(frozen=True)
class Look:
    """What the watcher saw at one moment."""

    at: float  # seconds, time.time()
    stores_bytes: int  # in all object stores
    fullest_bytes: int  # in the fullest one
    available_bytes: int  # of the machine's memory
    driver_rss_bytes: int
    driver_uss_bytes: int


@contextmanager
def watched(address: str) -> Iterator[Path]:
    """A file that grows by one Look a line, written by another process until the context ends."""
    with tempfile.TemporaryDirectory(prefix="tip-watch-") as directory:
        path = Path(directory) / "looks.jsonl"
        path.touch()
        spawn = multiprocessing.get_context("spawn")
        watcher = spawn.Process(target=_watch, args=(address, os.getpid(), path), daemon=True)
        watcher.start()
        try:
            yield path
        finally:
            watcher.terminate()
            watcher.join()


def looks(path: Path, begin: float, end: float) -> list[Look]:
    """Those between two moments."""
    lines = path.read_text(encoding="ascii").splitlines()
    return [
        look for look in (Look(**json.loads(line)) for line in lines) if begin <= look.at <= end
    ]


def _watch(address: str, driver: int, path: Path) -> None:
    """Ends the driver before the machine runs out of memory."""
    state, process = _state(address), psutil.Process(driver)
    totals = state.total_resources_per_node()
    weighed_at, memory = 0.0, process.memory_full_info()
    with path.open("a", encoding="ascii", buffering=1) as out:
        while True:
            if time.time() - weighed_at > _WEIGH_EVERY_S:
                weighed_at, memory = time.time(), process.memory_full_info()
            available = psutil.virtual_memory().available
            used = _used(totals, state.available_resources_per_node())
            look = {"at": time.time(), "stores_bytes": sum(used), "fullest_bytes": max(used)}
            look |= {"available_bytes": available}
            look |= {"driver_rss_bytes": memory.rss, "driver_uss_bytes": memory.uss}
            out.write(json.dumps(look) + "\n")
            if available < _LEAST_FREE_BYTES:
                os.kill(driver, signal.SIGTERM)
            time.sleep(_LOOK_EVERY_S)


def _state(address: str) -> Any:
    state = GlobalState()
    options = GcsClientOptions.create(
        address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
    )
    state._initialize_global_state(options)
    return state


def _used(totals: dict[str, Any], free: dict[str, Any]) -> list[int]:
    name = "object_store_memory"
    return [
        int(total[name] - free[node].get(name, 0))
        for node, total in totals.items()
        if name in total and node in free
    ]
