"""Runs of a Ray cluster: their jobs, and the run directories that they write."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from tip_ray.contract.errors import NotFoundError, SpecError, UnreachableError
from tip_ray.contract.run_state import ObservedStatus, RunState, RunStatus
from tip_ray.contract.spec import RunSpec
from tip_ray.control.run_directory import RUN_ROOT_VARIABLE
from tip_ray.control.run_reader import RunReader, list_runs
from tip_ray.service.client_jobs import Job, RayJobs, newest_job
from tip_ray.service.client_merge import merged
from tip_ray.service.client_run import DirectoryRun, Notice
from tip_ray.service.client_submit import submit_run


def cluster_run_root(run_root: str | None) -> str:
    """Where the cluster's runs are: an absolute path or a URL, by default TIP_RAY_RUN_ROOT.

    Raises:
        SpecError: it is relative: the driver works in another directory, on another machine.
    """
    given = os.path.expanduser(run_root or os.environ.get(RUN_ROOT_VARIABLE, ""))
    if "://" not in given and not os.path.isabs(given):
        found = repr(given) if given else "none"
        expected = "an absolute path or a URL that this machine and the cluster both reach"
        raise SpecError("run_root", found, expected, f"give --run-root or set {RUN_ROOT_VARIABLE}")
    return given.rstrip("/") or "/"


class ClusterRuns:
    """All runs under `run_root` and all jobs of the cluster."""

    def __init__(self, jobs: RayJobs, run_root: str, notice: Notice) -> None:
        self.jobs, self.run_root, self.notice = jobs, run_root, notice
        self.silence: UnreachableError | None = None
        """Why the cluster did not answer, if it did not when it was asked last."""

    def run(self, run_id: str) -> ClusterRun:
        return ClusterRun(self, run_id)

    def runs(self) -> list[ObservedStatus]:
        """Newest first; those that cannot be read, and a silent cluster, are told to `notice`."""
        jobs = self.known_jobs()
        statuses = {one.run_id: one for one in list_runs(self.run_root, self.notice)}
        own = (job.run_id for job in jobs if job.run_id and job.run_root == self.run_root)
        named = dict.fromkeys([*statuses, *own])
        now = time.time()
        found = [_seen(run_id, jobs, statuses.get(run_id), now) for run_id in named]
        there = [one for one in found if one is not None]
        return sorted(there, key=lambda status: status.started_at, reverse=True)

    def submit(self, spec: RunSpec, run_id: str) -> None:
        submit_run(self.jobs, self.run_root, spec, run_id, self.notice)

    def known_jobs(self) -> list[Job]:
        """The cluster's jobs; none, which is said once, where it does not answer."""
        try:
            jobs = self.jobs.all()
        except UnreachableError as error:
            if self.silence is None:
                self.notice(f"{error}; until it answers, run directories alone are shown")
            self.silence = error
            return []
        self.silence = None
        return jobs


class ClusterRun(DirectoryRun):
    """One run: its directory, and what the cluster says of its driver."""

    def __init__(self, cluster: ClusterRuns, run_id: str) -> None:
        super().__init__(f"{cluster.run_root}/{run_id}")
        self._cluster = cluster

    def read_status(self) -> ObservedStatus:
        """Raises UnreachableError where the cluster is silent and there is no directory yet."""
        jobs, status = self._cluster.known_jobs(), None
        with suppress(NotFoundError):
            status = RunReader.read_status(self)
        found = _seen(self.run_id, jobs, status, time.time())
        if found is not None:
            return found
        if self._cluster.silence is not None:
            raise self._cluster.silence
        raise NotFoundError(
            f"no run {self.run_id!r} at {self._cluster.run_root}, nor a job that is still to begin "
            f"it; see RunClient.runs(), or give the run_root that the cluster writes to"
        )

    def read_log(self) -> str:
        """What its driver's process wrote, else the log in its directory."""
        job_id = self.read_status().job_id
        if job_id is not None:
            with suppress(NotFoundError, UnreachableError):
                return self._cluster.jobs.log(job_id)
        return super().read_log()

    def cancel(self) -> bool:
        """A driver that has not begun yet would not see the request: its job is stopped."""
        found = self.read_status()
        if found.state is RunState.PENDING and found.job_id is not None:
            self._cluster.jobs.stop(found.job_id)
            return True
        return super().cancel()


def _seen(
    run_id: str, jobs: list[Job], status: RunStatus | None, now: float
) -> ObservedStatus | None:
    """A run by what is known of it; None if that is nothing."""
    job_id = None if status is None else status.job_id
    return merged(newest_job(jobs, run_id, job_id), status, now)
