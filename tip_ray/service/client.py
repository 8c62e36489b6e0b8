"""RunClient: submit runs, watch them, cancel them and read their numbers, from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from tip_ray.contract.run_state import ObservedStatus
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.spec_check import parse_spec
from tip_ray.control.run_directory import check_run_id, new_run_id
from tip_ray.control.spec_file import apply_overrides, load_spec
from tip_ray.service.client_cluster import ClusterRuns, cluster_run_root
from tip_ray.service.client_http import HttpRuns
from tip_ray.service.client_jobs import RayJobs
from tip_ray.service.client_run import POLL_S, Notice, Run, changes, follow, log_notice
from tip_ray.service.client_token import ray_token, read_token
from tip_ray.service.client_wire import Wire

TIMEOUT_S = 30.0


class _Runs(Protocol):
    """What a client needs of a place that has runs."""

    def run(self, run_id: str) -> Run: ...

    def runs(self) -> list[ObservedStatus]: ...

    def submit(self, spec: RunSpec, run_id: str) -> None: ...


class RunClient:
    """Runs of one place. Made by `cluster` or `http`.

    All methods raise NotFoundError for a run that is not there, AccessError for a token that is
    missing or wrong, UnreachableError where nothing answers in time, and RunDirectoryError for a
    file of a run that is broken: each one line that says what to do.
    """

    def __init__(self, runs: _Runs, notice: Notice = log_notice) -> None:
        self._runs, self._notice = runs, notice

    @classmethod
    def cluster(
        cls,
        address: str,
        *,
        run_root: str | None = None,
        token_file: str | Path | None = None,
        timeout_s: float = TIMEOUT_S,
        notice: Notice = log_notice,
    ) -> RunClient:
        """Through a Ray cluster's Jobs API and the run directories.

        Args:
            address: of the cluster's dashboard, e.g. http://head:8265.
            run_root: an absolute path or a URL that this machine and the cluster both reach; by
                default TIP_RAY_RUN_ROOT.
            token_file: holds the cluster's token; by default it comes from where Ray takes it:
                RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.
            timeout_s: a request gives up after that.
            notice: hears what is worth a line but no error; by default the log.

        Raises:
            SpecError: `address` is no http(s) address, or `run_root` is relative.
            AccessError: the token's file cannot be read.
        """
        runs = cluster_runs(address, run_root, token_file, timeout_s=timeout_s, notice=notice)
        return cls(runs, notice)

    @classmethod
    def http(
        cls,
        url: str,
        *,
        token_file: str | Path | None = None,
        timeout_s: float = TIMEOUT_S,
        notice: Notice = log_notice,
    ) -> RunClient:
        """Through a status API, as `tip-ray serve` answers at `url`.

        Raises:
            SpecError: `url` is no http(s) address.
            AccessError: the token's file cannot be read.
        """
        return cls(http_runs(url, token_file, timeout_s=timeout_s, notice=notice), notice)

    def submit(
        self,
        spec: str | Path | RunSpec,
        *,
        overrides: Mapping[str, Any] | None = None,
        run_id: str | None = None,
    ) -> str:
        """Start a run as a job of the cluster; returns its run id.

        Only the resolved spec is sent, under the client's run root. With the id of a run that a
        job drives already, or that has succeeded, nothing happens; one that has failed or was
        cancelled goes on from its checkpoint.

        Args:
            spec: a path or fsspec URL, or a spec.
            overrides: dotted path -> value, laid over it.
            run_id: DNS-1035, at most 40 characters; by default a new one.

        Raises:
            SpecError: the spec, or the run id, is refused; nothing was sent.
            NotSupportedError: this is a client of a status API.
        """
        if not isinstance(spec, RunSpec):
            spec = load_spec(spec, overrides)
        elif overrides:
            spec = parse_spec(apply_overrides(spec.model_dump(), overrides))
        run_id = check_run_id(run_id or new_run_id(spec.name))
        self._runs.submit(spec, run_id)
        return run_id

    def status(self, run_id: str) -> ObservedStatus:
        """What it is doing. Through a cluster, a driver that was killed reads FAILED."""
        return self._run(run_id).read_status()

    def watch(self, run_id: str, *, poll_s: float = POLL_S) -> Iterator[ObservedStatus]:
        """Its status at once, then whenever it changes; the last one is that of its end.

        Raises:
            RunFailedError: its driver has been silent for so long that it is lost.
        """
        return changes(follow(self._run(run_id), poll_s=poll_s, notice=self._notice))

    def wait(
        self, run_id: str, *, timeout_s: float | None = None, poll_s: float = POLL_S
    ) -> ObservedStatus:
        """Its last status, when it has ended, however it has.

        Raises:
            NotInTimeError: it has not ended within `timeout_s`.
            RunFailedError: as `watch`.
        """
        run = self._run(run_id)
        for found in follow(run, poll_s=poll_s, timeout_s=timeout_s, notice=self._notice):
            last = found
        return last

    def metrics(self, run_id: str) -> pa.Table:
        """One row a step, in order: the columns of `StepMetrics`."""
        return self._run(run_id).read_metrics()

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """By time: `time` (seconds since 1970), `kind`, `step` and the kind's own fields."""
        return self._run(run_id).read_events()

    def samples(self, run_id: str, step: int | None = None) -> pa.Table:
        """Rollouts of `step`, or of the newest step that has some: SAMPLES_WITH_TEXT."""
        return self._run(run_id).read_samples(step)

    def logs(self, run_id: str) -> str:
        """What its driver wrote.

        Raises:
            NotSupportedError: this is a client of a status API.
        """
        return self._run(run_id).read_log()

    def cancel(self, run_id: str) -> bool:
        """Ask it to stop after its step and a checkpoint; False if it has ended already."""
        return self._run(run_id).cancel()

    def runs(self) -> list[ObservedStatus]:
        """All runs, newest first."""
        return self._runs.runs()

    def _run(self, run_id: str) -> Run:
        return self._runs.run(check_run_id(run_id))


def cluster_runs(
    address: str,
    run_root: str | None,
    token_file: str | Path | None,
    *,
    timeout_s: float = TIMEOUT_S,
    notice: Notice,
) -> ClusterRuns:
    """The runs of a cluster; errors as `RunClient.cluster`."""
    token, what = ray_token(token_file), "the Ray cluster"
    cure = "give the cluster's in --token-file (token_file=) or RAY_AUTH_TOKEN_PATH"
    wire = Wire(address, token, what=what, token_cure=cure, timeout_s=timeout_s)
    return ClusterRuns(RayJobs(wire), cluster_run_root(run_root), notice)


def http_runs(
    url: str, token_file: str | Path | None, *, timeout_s: float = TIMEOUT_S, notice: Notice
) -> HttpRuns:
    """The runs of a status API; errors as `RunClient.http`."""
    token = None if token_file is None else read_token(token_file)
    cure = "give the one that `tip-ray serve` was started with in --token-file (token_file=)"
    what = "the status API"
    return HttpRuns(Wire(url, token, what=what, token_cure=cure, timeout_s=timeout_s), notice)
