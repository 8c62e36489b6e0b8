"""A spec as a Ray job: what travels, what may not, and which attempt it is."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tip_ray.contract.errors import NotFoundError, NotInTimeError, SpecError
from tip_ray.contract.run_state import RunState, RunStatus
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.spec_check import parse_spec
from tip_ray.control.plan_devices import DEVICE_VARIABLE
from tip_ray.control.run_directory import SPEC
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import check_resume, dump_spec, load_spec, redacted
from tip_ray.service.client_jobs import Job, RayJobs, newest_job, submission_id
from tip_ray.service.client_run import Notice

_WHEN = (1980, 1, 1, 0, 0, 0)  # the same spec makes the same archive
_DIGEST = "spec_sha256"
_END_S = 120.0  # from a driver's last word to the end of its process
_LOOK_EVERY_S = 0.5


def submit_run(jobs: RayJobs, run_root: str, spec: RunSpec, run_id: str, notice: Notice) -> None:
    """Start a run as a job, or see that nothing needs to be started.

    A run that a job drives already and one that has succeeded are left as they are; a run that
    has failed or was cancelled goes on from its checkpoint, in the next attempt.

    Raises:
        SpecError: a secret or a path of this machine in the spec; or it differs from that of the
            run that is to be resumed in more than a resume may change. Nothing was sent.
        NotInTimeError: the driver before has ended the run, but its process does not end.
        UnreachableError, AccessError, RunFailedError: as `RayJobs.submit`.
    """
    spec = parse_spec({**spec.model_dump(), "run_root": run_root})  # what the cluster will read
    check_travels(spec)
    name, content = package(spec)
    known = jobs.all()
    reader = RunReader(f"{run_root}/{run_id}")
    status = _status(reader)
    driving = newest_job(known, run_id, None if status is None else status.job_id)
    if driving is not None and not driving.ended and not _has_spoken(driving, status):
        notice(_driven(run_id, driving, name))
        return
    if reader.exists():
        check_resume(load_spec(f"{reader.url}/{SPEC}"), spec)
    if status is not None and status.state is RunState.SUCCEEDED:
        notice(f"{run_id} has succeeded before; nothing to do")
        return
    _await_end(jobs, driving)
    attempt = 1 + max((job.attempt for job in jobs.all() if job.run_id == run_id), default=0)
    words = ["tip-ray", "run", SPEC, "--run-id", run_id, "--run-root", run_root]
    if devices := os.environ.get(DEVICE_VARIABLE):  # what it was validated for
        words = ["env", f"{DEVICE_VARIABLE}={devices}", *words]
    metadata = {"name": spec.name, "steps": str(spec.steps), _DIGEST: name}
    jobs.submit(submission_id(run_id, attempt), shlex.join(words), (name, content), metadata)


def check_travels(spec: RunSpec) -> None:
    """Raises SpecError if a value of `spec` may not or cannot leave this machine."""
    data = spec.model_dump()
    for path in _differing(data, redacted(data)):
        raise SpecError(
            path,
            "a secret",
            "none: who may see the cluster's jobs can read their specs",
            "put it into the cluster's environment, or a file that is mounted there",
        )
    for path, place in _places(spec):
        if not os.path.isabs(place) and "://" not in place and os.path.exists(place):
            raise SpecError(
                path,
                f"{place!r}, a file or folder of this machine",
                "an absolute path or a URL that the cluster reaches",
                "copy it there, or use `ray job submit --working-dir . -- tip-ray run`",
            )


def package(spec: RunSpec) -> tuple[str, bytes]:
    """A working directory with the spec alone: its name, by its content, and a zip archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        files.writestr(zipfile.ZipInfo(SPEC, _WHEN), dump_spec(spec))
    content = archive.getvalue()
    return f"_ray_pkg_{hashlib.sha256(content).hexdigest()[:40]}.zip", content


def _status(reader: RunReader) -> RunStatus | None:
    try:
        return reader.read_status()
    except NotFoundError:
        return None


def _has_spoken(job: Job, status: RunStatus | None) -> bool:
    """Whether a driver has written its last word, though its process may still clear up."""
    return status is not None and status.state.ended and status.job_id == job.submission_id


def _await_end(jobs: RayJobs, job: Job | None) -> None:
    """Until the process of a driver that has written its last word is gone."""
    deadline = time.monotonic() + _END_S
    while job is not None and not job.ended:
        if time.monotonic() > deadline:
            cure = f"stop it with `ray job stop {job.submission_id}`"
            raise NotInTimeError(f"job {job.submission_id} has not ended in {_END_S:g} s; {cure}")
        time.sleep(_LOOK_EVERY_S)
        job = next((one for one in jobs.all() if one.submission_id == job.submission_id), None)


def _driven(run_id: str, job: Job, name: str) -> str:
    line = f"{run_id}: job {job.submission_id} is at it already ({job.state})"
    same = job.metadata.get(_DIGEST, name) == name
    return line if same else f"{line}, with a spec that differs from this one and stands"


def _differing(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of leaves that differ."""
    if isinstance(before, Mapping):
        items: Iterable[Any] = before.items()
    elif isinstance(before, (list, tuple)):
        items = enumerate(before)
    else:
        if before != after:
            yield path
        return
    for key, value in items:
        yield from _differing(value, after[key], f"{path}.{key}" if path else str(key))


def _places(spec: RunSpec) -> Iterator[tuple[str, str]]:
    """(field, value) of what is a path, a URL, or a name on a hub."""
    yield "student.model", spec.student.model
    yield "teacher.model", spec.teacher.model
    yield "prompts.source", spec.prompts.source
    for index, one in enumerate(spec.evaluation):
        yield f"evaluation.{index}.source", one.source
