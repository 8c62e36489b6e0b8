"""The jobs of a Ray cluster, through its Jobs API; a run's jobs are known by their entrypoints."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

from tip_ray.contract.errors import NotFoundError, RunFailedError, UnreachableError
from tip_ray.control.run_directory import is_run_id
from tip_ray.service.client_wire import Wire, said

JobState = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
_ENDS = ("STOPPED", "SUCCEEDED", "FAILED")
_PAUSE_S = 1.0
_ACCEPT_S = 120.0  # from the dashboard's first answer to its first agent, on a slow head
_ABSENT = 404


@dataclass(frozen=True)
class Job:
    """One job; its process is the driver of `run_id`."""

    submission_id: str
    state: JobState
    entrypoint: str
    submitted_at: float
    """Seconds since 1970."""
    ended_at: float | None = None
    exit_code: int | None = None
    """Of the driver's process; negative: killed by that signal."""
    message: str = ""
    """Ray's words about the state; of a failed job with the end of its log."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.state in _ENDS

    @property
    def run_id(self) -> str | None:
        """As the entrypoint names it."""
        named = self._option("--run-id")
        return named if named and is_run_id(named) else None

    @property
    def run_root(self) -> str | None:
        """As the entrypoint names it."""
        return self._option("--run-root")

    def _option(self, name: str) -> str | None:
        try:
            words = shlex.split(self.entrypoint)
        except ValueError:
            return None
        given = [value for option, value in pairwise(words) if option == name]
        given += [w.partition("=")[2] for w in words if w.startswith(f"{name}=")]
        return given[-1] if given else None

    @property
    def attempt(self) -> int:
        """The number at the end of `submission_id`; 0 of a job that was not submitted by us."""
        head, _, number = self.submission_id.rpartition("-a")
        return int(number) if head and head == self.run_id and number.isdecimal() else 0


def submission_id(run_id: str, attempt: int) -> str:
    """Ray takes a submission id once."""
    return f"{run_id}-a{attempt}"


def newest_job(jobs: Iterable[Job], run_id: str, job_id: str | None = None) -> Job | None:
    """The last job that drives a run, or that its status names as its driver's."""
    own = [job for job in jobs if job.run_id == run_id or job.submission_id == job_id]
    return max(own, key=lambda job: (job.submitted_at, job.attempt), default=None)


class RayJobs:
    """Jobs of the cluster that `wire` leads to. All raise UnreachableError or AccessError."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def all(self) -> list[Job]:
        """Every submitted job that the cluster remembers."""
        body = self._wire.json(self._wire.get("/api/jobs/"))
        if not isinstance(body, list):
            raise self._wire.unreachable("answers with no list of jobs")
        return [_job(one) for one in body if _is_job(one)]

    def submit(
        self, job_id: str, entrypoint: str, files: tuple[str, bytes], metadata: Mapping[str, str]
    ) -> None:
        """Start a job whose working directory is a package.

        Args:
            files: the package's name and its content, a zip archive.

        Raises:
            RunFailedError: the cluster refuses the job.
        """
        name, content = files
        self._insist("PUT", f"/api/packages/gcs/{name}", data=content)
        body = {
            "entrypoint": entrypoint,
            "submission_id": job_id,
            "runtime_env": {"working_dir": f"gcs://{name}"},
            "metadata": dict(metadata),
        }
        self._insist("POST", "/api/jobs/", done=job_id, json=body)

    def stop(self, job_id: str) -> None:
        """SIGTERM, and SIGKILL some seconds later; nothing happens to a job that has ended."""
        answer = self._wire.send("POST", f"/api/jobs/{job_id}/stop", repeat=True)
        if answer.status_code != _ABSENT:
            self._wire.json(answer)

    def log(self, job_id: str) -> str:
        """What the job's process wrote.

        Raises:
            NotFoundError: the cluster does not know the job.
        """
        answer = self._wire.get(f"/api/jobs/{job_id}/logs")
        if answer.status_code == _ABSENT:
            raise NotFoundError(f"{self._wire.url}: no job {job_id}")
        return str(self._wire.json(answer).get("logs") or "")

    def _insist(self, method: str, path: str, *, done: str | None = None, **body: Any) -> None:
        """Until it is accepted: a head that has just started has no agent to take a job yet.

        Args:
            done: a job that is there once an earlier try, whose answer was lost, was accepted.
        """
        deadline = time.monotonic() + max(_ACCEPT_S, self._wire.timeout_s)
        while True:
            try:
                answer = self._wire.send(method, path, repeat=False, **body)
                if answer.ok or (done and self._knows(done)):
                    return
                if answer.status_code < 500:
                    raise RunFailedError(f"{self._wire.url}: refuses the job: {said(answer)}")
                problem = self._wire.unreachable(f"answers {answer.status_code}: {said(answer)}")
            except UnreachableError as error:
                problem = error
            if time.monotonic() + _PAUSE_S > deadline:
                raise problem
            time.sleep(_PAUSE_S)

    def _knows(self, job_id: str) -> bool:
        return self._wire.get(f"/api/jobs/{job_id}").ok


def _is_job(one: Any) -> bool:
    """Drivers that nobody submitted are listed too, without a submission id."""
    return (
        isinstance(one, dict)
        and isinstance(one.get("submission_id"), str)
        and one.get("status") in get_args(JobState)
    )


def _job(one: Mapping[str, Any]) -> Job:
    ended = one.get("end_time")
    return Job(
        submission_id=one["submission_id"],
        state=one["status"],
        entrypoint=str(one.get("entrypoint") or ""),
        submitted_at=(one.get("start_time") or 0) / 1000,
        ended_at=ended / 1000 if ended else None,
        exit_code=one.get("driver_exit_code"),
        message=str(one.get("message") or ""),
        metadata=one.get("metadata") or {},
    )
