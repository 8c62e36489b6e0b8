"""Reaching a Ray cluster, or starting a private one, and reserving bundles of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from tip_ray.contract.errors import PlacementError
from tip_ray.runtime.tasks import within

Bundle = Mapping[str, float]


@contextmanager
def connected(address: str | None, *, num_cpus: int, namespace: str) -> Iterator[None]:
    """A connection to the cluster at `address`, or a private one that ends with the context.

    Args:
        address: as `ray.init` takes it; None starts a cluster on this machine. Inside a Ray job
            the job's own cluster is used.
        num_cpus: logical CPUs of a private cluster: the demand, whatever the machine has, since
            every actor's threads are set explicitly.

    Raises:
        PlacementError: nothing answers at `address`.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": namespace}
    if address:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            found = str(error).splitlines()[0]
            raise PlacementError(f"--ray-address: {found}; is `ray start --head` up?") from None
        try:
            yield
        finally:
            ray.shutdown()
        return
    temp_dir = tempfile.mkdtemp(prefix="tip-ray-", dir=os.environ.get("RAY_TMPDIR"))
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            _temp_dir=temp_dir,
            **quiet,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)


def refuse_what_never_fits(demand: Mapping[str, Sequence[Bundle]]) -> None:
    """Raise PlacementError if the bundles of `demand` (by pool) cannot all lie on today's nodes."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    free = [dict(node) for node in nodes]
    bundles = [(pool, bundle) for pool, own in demand.items() for bundle in own]
    for pool, bundle in sorted(bundles, key=lambda item: _size(item[1]), reverse=True):
        home = next((node for node in free if _fits(bundle, node)), None)
        if home is None:
            raise PlacementError(_never_fits(pool, bundle, demand, nodes))
        for name, amount in bundle.items():
            home[name] = home.get(name, 0.0) - amount


def _fits(bundle: Bundle, node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items())


def _size(bundle: Bundle) -> tuple[float, float]:
    return bundle.get("GPU", 0.0), bundle.get("CPU", 0.0)


def _never_fits(
    pool: str,
    bundle: Bundle,
    demand: Mapping[str, Sequence[Bundle]],
    nodes: Sequence[Mapping[str, float]],
) -> str:
    names = sorted({name for own in demand.values() for one in own for name in one})
    total = {n: sum(one.get(n, 0.0) for own in demand.values() for one in own) for n in names}
    have = {name: sum(node.get(name, 0.0) for node in nodes) for name in names}
    return (
        f"{pool}: a replica needs {_shown(bundle)} on one node; the run needs {_shown(total)} in "
        f"all, the cluster's {len(nodes)} node(s) have {_shown(have)}; lower replicas, num_cpus "
        f"or num_gpus, or use a larger cluster"
    )


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"


async def reserve(
    demand: Mapping[str, Sequence[Bundle]], *, timeout_s: float
) -> dict[str, PlacementGroup]:
    """One placement group a pool, all of them ready.

    Raises:
        PlacementError: the cluster did not make room in `timeout_s`; nothing stays reserved.
    """
    groups = {
        pool: placement_group([dict(one) for one in bundles], strategy="PACK")
        for pool, bundles in demand.items()
    }
    ready: Any = asyncio.gather(*(_ready(group) for group in groups.values()))
    try:
        await within(timeout_s, ready)
    except TimeoutError:
        waiting = [pool for pool, group in groups.items() if not group.wait(0)]
        release(groups)
        raise PlacementError(
            f"faults.placement_timeout_s: after {timeout_s:g} s still no room for "
            f"{', '.join(f'{pool} ({_shown(demand[pool][0])})' for pool in waiting)}; free "
            f"resources of the cluster or raise the time"
        ) from None
    except BaseException:  # the caller does not know them yet
        release(groups)
        raise
    return groups


async def _ready(group: PlacementGroup) -> None:
    await group.ready()


def release(groups: Mapping[str, PlacementGroup]) -> None:
    """Give the bundles back."""
    for group in groups.values():
        remove_placement_group(group)
