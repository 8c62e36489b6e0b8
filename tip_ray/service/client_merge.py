"""What a run is doing, by its directory and by its Ray job together.

The directory knows steps and numbers but cannot say that its driver was killed; the job knows
whether the driver's process lives, and nothing of the run. Read the job first: a driver writes
its last word before its process ends, so a status that is read later than an ended job is final.
"""

from __future__ import annotations

import signal
from typing import Any

from tip_ray.contract.run_state import ObservedStatus, RunState, RunStatus, observe
from tip_ray.service.client_jobs import Job

_CANCELLED_EXIT = 130
_NO_COMMAND = 127  # of a shell
_ERROR = "error: "  # how the driver's process begins its last line
_RESUME = "start it again with the same run id to go on from its checkpoint"


def merged(job: Job | None, status: RunStatus | None, now: float) -> ObservedStatus | None:
    """The run's status at `now`, None where neither knows of it.

    Args:
        job: the newest that drives the run.
        status: status.json, read after `job`.
    """
    if status is None:
        return None if job is None else _of_job(job, now)
    if job is None:
        return observe(status, now)
    if status.job_id == job.submission_id:
        killed = job.ended and not status.state.ended
        return observe(_changed(status, _killed(job)) if killed else status, now)
    return observe(_after_another(job, status, now), now)


def _of_job(job: Job, now: float) -> ObservedStatus | None:
    """A run whose driver has written nothing yet."""
    steps = job.metadata.get("steps", "")
    status = RunStatus(
        run_id=job.run_id or job.submission_id,
        name=job.metadata.get("name") or job.run_id or job.submission_id,
        steps=int(steps) if steps.isdecimal() else 0,
        started_at=job.submitted_at,
        updated_at=job.submitted_at,
        heartbeat_at=job.ended_at or now,
        job_id=job.submission_id,
        waiting_for=_begins(job),
    )
    if job.state == "SUCCEEDED":
        return None
    return observe(_changed(status, _refused(job)) if job.ended else status, now)


def _after_another(job: Job, status: RunStatus, now: float) -> RunStatus:
    """The status is of an earlier attempt, or of a driver that is no job of this cluster."""
    word = max(status.heartbeat_at, status.updated_at)
    if not job.ended:
        if word > job.submitted_at:
            return status
        changes = {
            "error": None,
            "exit_code": None,
            "heartbeat_at": now,
            "waiting_for": _begins(job),
        }
        return _changed(status, {**changes, "state": RunState.PENDING, "job_id": job.submission_id})
    nothing_to_do = job.state == "SUCCEEDED" or status.state is RunState.SUCCEEDED
    if nothing_to_do or word > (job.ended_at or now):
        return status
    return _changed(status, _refused(job))


def _begins(job: Job) -> str:
    if job.state == "PENDING":
        return f"job {job.submission_id} to start"
    return f"its driver (job {job.submission_id}), which checks the spec, the models and prompts"


def _killed(job: Job) -> dict[str, Any]:
    """The process is gone without a last word."""
    how = "" if job.exit_code is None else f" ({_exit(job.exit_code)})"
    error = f"the driver's process ended without a word{how}; {_RESUME}"
    return _failed(job, error, None)


def _refused(job: Job) -> dict[str, Any]:
    """The process ended before it wrote to the run directory."""
    if job.state == "STOPPED":
        ended = _failed(job, "stopped before it began", _CANCELLED_EXIT)
        return {**ended, "state": RunState.CANCELLED}
    lines = [line.strip() for line in job.message.splitlines()]
    own = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    code = job.exit_code if job.exit_code is not None and job.exit_code > 0 else None
    if own:
        return _failed(job, own[-1], code)
    if code == _NO_COMMAND:
        found = "no `tip-ray` on the PATH of the cluster's head; install it there, in every image"
    else:
        found = next((line for line in lines if line), "the job failed")
    return _failed(job, f"job {job.submission_id}: {found}", code)


def _failed(job: Job, error: str, code: int | None) -> dict[str, Any]:
    ended = {"updated_at": job.ended_at} if job.ended_at else {}
    failed = {"state": RunState.FAILED, "error": error, "exit_code": code, "waiting_for": None}
    return {**failed, **ended, "job_id": job.submission_id}


def _exit(code: int) -> str:
    """Negative, or above 128 through a shell: a signal."""
    number = -code if code < 0 else code - 128
    names = {one.value: one.name for one in signal.Signals}
    return f"exit code {code}, {names[number]}" if number in names else f"exit code {code}"


def _changed(status: RunStatus, changes: dict[str, Any]) -> RunStatus:
    return status.model_copy(update=changes)
