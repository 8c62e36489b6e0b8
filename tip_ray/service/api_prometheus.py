"""Prometheus metrics: a few gauges a run, and the service's own requests.

Label values are bounded: at most `RUNS_SHOWN` runs, those that have not ended and then the newest;
routes by their template; methods that exist.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from tip_ray.contract.run_state import Health, ObservedStatus, RunState, observe
from tip_ray.service.api_read import Listing

RUNS_SHOWN = 200
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_LARGEST = 2.0**63

_Value = float | int | None
_GAUGES: dict[str, tuple[str, Callable[[ObservedStatus], _Value]]] = {
    "step": ("Steps trained and published.", lambda run: run.step),
    "steps": ("Steps that the run is to make.", lambda run: run.steps),
    "loss": ("Loss of the newest step.", lambda run: run.loss),
    "accuracy": ("mean@samples of the first evaluation.", lambda run: run.accuracy),
    "kept_fraction": ("Share of response tokens kept.", lambda run: run.kept_fraction),
    "shipped_bytes": ("Bytes from cut to the learners.", lambda run: run.bytes_shipped),
    "unpruned_bytes": ("The same, had every token been kept.", lambda run: run.bytes_unpruned),
    "generated_tokens": ("Tokens generated.", lambda run: run.tokens_generated),
    "kept_tokens": ("Tokens kept.", lambda run: run.tokens_kept),
    "learner_tokens_per_second": ("Of the newest step.", lambda run: run.learner_tokens_per_s),
    "heartbeat_age_seconds": ("Since the last sign of life.", lambda run: run.heartbeat_age_s),
    "recoveries": ("Recoveries from faults.", lambda run: run.recoveries),
    "rollouts_quarantined": ("Rollouts set aside.", lambda run: run.rollouts_quarantined),
    "updates_skipped": ("Updates that were not finite.", lambda run: run.updates_skipped),
}


class Prometheus:
    """A registry of its own: two services in one process do not meet."""

    def __init__(self, listing: Callable[[], Listing]) -> None:
        self._registry = CollectorRegistry()
        self._listing = listing
        self._registry.register(self)
        self._requests = Counter(
            "tip_ray_service_requests",
            "Requests answered.",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "tip_ray_service_request_seconds",
            "From a request's head to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        known = method if method in _METHODS else "other"
        self._requests.labels(route, known, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format; reads the runs' status files."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read the runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        listing, now = self._listing(), time.time()
        shown = sorted(listing.runs, key=lambda run: run.state.ended)[:RUNS_SHOWN]
        runs = [observe(run, now) for run in shown]
        yield _one("tip_ray_runs", "Runs that can be read.", len(listing.runs))
        yield _one("tip_ray_runs_broken", "Runs that cannot be read.", len(listing.broken))
        yield _choice(runs, "state", [state.value for state in RunState], lambda run: run.state)
        yield _choice(runs, "health", list(get_args(Health)), lambda run: run.health)
        for name, (text, value_of) in _GAUGES.items():
            family = GaugeMetricFamily(f"tip_ray_run_{name}", text, labels=["run_id"])
            for run in runs:
                if (value := value_of(run)) is not None:
                    family.add_metric([run.run_id], _number(value))
            yield family


def _one(name: str, text: str, value: int) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _choice(
    runs: list[ObservedStatus], name: str, values: list[str], of: Callable[[ObservedStatus], str]
) -> Metric:
    """1 for what a run is and 0 for what it is not, so that an alert needs no absent()."""
    text = f"1 where it is the run's {name}."
    family = GaugeMetricFamily(f"tip_ray_run_{name}", text, labels=["run_id", name])
    for run in runs:
        for value in values:
            family.add_metric([run.run_id, value], float(of(run) == value))
    return family


def _number(value: float | int) -> float:
    """A file may hold an integer that no float can."""
    return float(min(max(value, -_LARGEST), _LARGEST)) if isinstance(value, int) else value
