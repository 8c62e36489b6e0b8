"""Scale on paper: the real pipeline with 1 to 64 replicas of every pool, over stages that sleep.

Several Ray nodes on this machine, tables of true size, no model: see `scale_run`, `scale_cluster`.
GPU work of `--seconds` a step is shared out between the replicas, so that the step's ideal falls
with them and what remains is this project's and Ray's own. Loads:

    control      512 response tokens: what scheduling costs; tables still lie in object stores
    topk         8,192 tokens at K = 64
    topk, lag 1  the same, two steps under way, as `max_lag: 1` admits
    hidden       8,192 tokens at d = 4,096, fewer rollouts: the machine's memory holds no more

The stages' sleeping costs no CPU, but making, copying and checking tables does, on the two cores
that all nodes share here and on a cluster have one each.

    python -m tests.benchmarks.scale --output outputs/bench
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.common import print_table, write_json
from tests.benchmarks.memory import in_fresh_process
from tests.benchmarks.scale_cluster import GIB, Stores, cluster, looks, stored, watched
from tests.benchmarks.scale_cluster import system_processes as system
from tests.benchmarks.scale_run import Crew, Marks, Replicas, Shape, figures, spec_of, with_rows
from tests.benchmarks.scale_stages import MIN_ROWS, Load, Made, make_contents

MIB = 1 << 20
RESPONSE_TOKENS, CONTROL_TOKENS = 8192, 512


@dataclass(frozen=True)
class Case:
    """One load on warm pools."""

    name: str
    load: Load
    only: tuple[int, ...]  # replica counts
    max_lag: int = 0


@dataclass(frozen=True)
class Family:
    """Loads that share pools."""

    shape: Shape
    stores: Stores
    cases: tuple[Case, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument(
        "--most-others", type=int, default=32, help="teacher and learner replicas, at most"
    )
    parser.add_argument(
        "--most-whole", type=int, default=32, help="replicas that get tables of true size, at most"
    )
    parser.add_argument("--hidden-replicas", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--hidden-rows", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=16.0, help="GPU work of a step of --rows")
    parser.add_argument("--steps", type=int, default=4, help="the first warms up")
    parser.add_argument("--lagged", type=int, nargs="*", default=[1, 16])
    given = parser.parse_args()
    topk, hidden = families(given)
    command = " ".join(["python", "-m", "tests.benchmarks.scale", *sys.argv[1:]])
    found = []
    for family, counts in ((topk, given.replicas), (hidden, given.hidden_replicas)):
        for count in counts:
            others = min(count, given.most_others)
            replicas = Replicas(count, others, others)
            found += in_fresh_process(measure, family, replicas, given.steps)
            write_json(given.output, "scale", found, command=command)
            print(f"{family.shape.targets}, {count} replicas: done", flush=True)  # noqa: T201
    found.sort(key=lambda one: one["replicas"]["rollout"])
    for name in dict.fromkeys(one["load"] for one in found):
        print(f"\n{name}\n")  # noqa: T201
        print_table([_line(one) for one in found if one["load"] == name])
    print("\nMB a step by hop\n")  # noqa: T201
    print_table([_hops(one) for one in found if one["max_lag"] == 0])


def families(given: argparse.Namespace) -> tuple[Family, Family]:
    """topk and hidden; a rollout costs as much in either."""
    half, quarter = given.seconds / 2, given.seconds / 4
    control = Load(given.rows, CONTROL_TOKENS, half, quarter, quarter)
    whole = Load(given.rows, RESPONSE_TOKENS, half, quarter, quarter)
    fit = tuple(count for count in given.replicas if count <= given.most_whole)
    cases = (
        Case("control", control, tuple(given.replicas)),
        Case("topk", whole, fit),
        Case("topk, lag 1", whole, tuple(given.lagged), max_lag=1),
    )
    topk = Family(Shape("topk", 64, 64), Stores(rollout=2.5, teacher=4.0, learner=2.0), cases)
    fewer = Case("hidden", with_rows(whole, given.hidden_rows), tuple(given.hidden_replicas))
    stores = Stores(rollout=1.0, teacher=5.5, learner=3.5)
    return topk, Family(Shape("hidden", 16, 4096), stores, (fewer,))


def measure(family: Family, replicas: Replicas, steps: int) -> list[dict[str, Any]]:
    """Every load of `family` on one cluster, in a process that has held nothing before."""
    shape, found = family.shape, []
    with tempfile.TemporaryDirectory(prefix="tip-scale-") as name:
        made = Made(Path(name))
        hidden = shape.width if shape.targets == "hidden" else 0
        make_contents(made.directory, MIN_ROWS * RESPONSE_TOKENS, shape.k, hidden)
        with cluster(asdict(replicas), family.stores) as address, watched(address) as watch:
            began = time.monotonic()
            crew = Crew.start(spec_of(shape, replicas, placed=True), shape, made)
            start_s = time.monotonic() - began
            try:
                for case in family.cases:
                    if replicas.rollout not in case.only:
                        continue
                    one = _measure(crew, case, replicas, steps, watch)
                    found.append(one | {"start_s": start_s})
            finally:
                crew.close()
    return found


def _measure(crew: Crew, case: Case, replicas: Replicas, steps: int, watch: Path) -> dict[str, Any]:
    before, faults = stored(), len(crew.events)
    marks, _ = crew.run(case.load, steps=steps, max_lag=case.max_lag, marks=Marks(system()))
    after = stored()
    seen = looks(watch, marks[0].at, marks[-1].at)
    return {
        "load": case.name,
        "max_lag": case.max_lag,
        "rows": case.load.rows,
        "response_tokens": case.load.response_tokens,
        **figures(marks, case.load, replicas),
        "created_bytes": (after["created_bytes"] - before["created_bytes"]) / steps,
        "spilled_bytes": after["spilled_bytes"] - before["spilled_bytes"],
        "stores_peak_bytes": max(look.stores_bytes for look in seen),
        "stores_low_bytes": min(look.stores_bytes for look in seen),
        "store_peak_bytes": max(look.fullest_bytes for look in seen),
        "driver_rss_bytes": max(look.driver_rss_bytes for look in seen),
        "driver_uss_bytes": max(look.driver_uss_bytes for look in seen),
        "least_available_bytes": min(look.available_bytes for look in seen),
        "faults": crew.events[faults:],
    }


def _line(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "replicas": _shown(one["replicas"]),
        "tables": one["tables"],
        "step s": one["step_s"],
        "ideal s": one["ideal_s"] if one["max_lag"] == 0 else None,
        "overhead s": one["overhead_s"] if one["max_lag"] == 0 else None,
        "selector s": one["selector_s"],
        "cut s, all": one["cut_s"],
        "publish s": one["publish_s"],
        "driver CPU s": one["driver_cpu_s"],
        "its loop": one["loop_cpu_s"],
        "raylets, GCS CPU s": one["system_cpu_s"],
        "machine CPU s": one["machine_cpu_s"],
        "stores, peak GiB": one["stores_peak_bytes"] / GIB,
        "made in them, GiB": one["created_bytes"] / GIB,
        "spilled GiB": one["spilled_bytes"] / GIB,
        "driver RSS MiB": one["driver_rss_bytes"] / MIB,
        "USS MiB": one["driver_uss_bytes"] / MIB,
    }


def _hops(one: dict[str, Any]) -> dict[str, Any]:
    hops = {hop: nbytes / 1e6 for hop, nbytes in one["hops_bytes"].items()}
    return {"load": one["load"], "replicas": _shown(one["replicas"]), **hops}


def _shown(replicas: dict[str, int]) -> str:
    """Rollout, teacher, learner; one number where they are the same."""
    counts = list(replicas.values())
    return str(counts[0]) if len(set(counts)) == 1 else " ".join(map(str, counts))


if __name__ == "__main__":
    main()
