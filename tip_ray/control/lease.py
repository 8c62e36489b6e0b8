"""Who may drive a run: a new one, one to go on with, or one that another driver still drives."""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import dataclass

from tip_ray.contract.errors import NotFoundError, RunDirectoryError
from tip_ray.contract.run_state import HEARTBEAT_S, LOST_AFTER_S, RunState, RunStatus
from tip_ray.contract.spec import RunSpec
from tip_ray.control.run_directory import RAY_JOB_VARIABLE, SPEC, RunDirectory
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import check_resume, load_spec

_LOOK_EVERY_S = 0.5
_WATCH_S = 2.5 * HEARTBEAT_S  # a heart that stands still for so long has stopped


@dataclass(frozen=True)
class Lease:
    """A run directory, and the status with which this driver begins to write it.

    `status.state` is SUCCEEDED where there is nothing left to do.
    """

    directory: RunDirectory
    status: RunStatus

    def claim(self, spec: RunSpec) -> None:
        """Begin to drive: from here on the driver before this one stops at its next write.

        Raises:
            LeaseLostError: another one began in the same moment, and was first.
        """
        self.directory.write_status(self.status)
        self.directory.clear_cancel()
        self.directory.write_spec(spec)


def begin(spec: RunSpec, run_id: str) -> Lease:
    """A new run directory, for a run id that nobody has used.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    directory = RunDirectory.create(spec.run_root, run_id, spec)
    return Lease(directory, _fresh(spec, run_id))


def take_over(spec: RunSpec, run_id: str) -> Lease | None:
    """The lease of a run that exists, None if there is no such run.

    Nothing is written before `claim`. A driver that was killed leaves a heartbeat that stands
    still: it is watched for a while, so that clocks that differ do no harm.

    Raises:
        SpecError: `spec` differs from the run's in more than a resume may change.
        RunDirectoryError: another driver is at it.
    """
    try:
        directory = RunDirectory.open(spec.run_root, run_id)
    except NotFoundError:
        return None
    check_resume(load_spec(f"{directory.url}/{SPEC}"), spec)
    try:
        status = RunReader(directory.url).read_status()
    except NotFoundError:  # its driver died before the first word
        return Lease(directory, _fresh(spec, run_id))
    if status.state is RunState.SUCCEEDED:
        return Lease(directory, status)
    if not status.state.ended:
        _refuse_if_driven(directory, status)
    now = time.time()
    changes = {
        "epoch": status.epoch + 1,
        "driver": secrets.token_hex(8),
        "job_id": _ray_job_id(),
        "steps": spec.steps,
        "state": RunState.PENDING,  # an ended one would be taken over by the next, too
        "error": None,
        "exit_code": None,
        "waiting_for": None,
        "updated_at": now,
        "heartbeat_at": now,
    }
    return Lease(directory, status.model_copy(update=changes))


def _refuse_if_driven(directory: RunDirectory, status: RunStatus) -> None:
    reader = RunReader(directory.url)
    if time.time() - status.heartbeat_at > LOST_AFTER_S:
        return
    deadline = time.monotonic() + _WATCH_S
    while time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
        if reader.read_status().heartbeat_at != status.heartbeat_at:
            raise RunDirectoryError(
                f"{directory.url}: another driver is at this run (epoch {status.epoch}, its "
                f"heartbeat moves); wait for it, or `tip-ray cancel {directory.run_id}`"
            )


def _fresh(spec: RunSpec, run_id: str) -> RunStatus:
    now = time.time()
    return RunStatus(
        run_id=run_id,
        name=spec.name,
        driver=secrets.token_hex(8),
        job_id=_ray_job_id(),
        steps=spec.steps,
        started_at=now,
        updated_at=now,
        heartbeat_at=now,
    )


def _ray_job_id() -> str | None:
    """The submission id of the Ray job whose entrypoint this process is, if it is one's."""
    try:
        found = json.loads(os.environ.get(RAY_JOB_VARIABLE, ""))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found)
