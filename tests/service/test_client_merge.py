"""A run by its status file and its Ray job together: killed, lost, stale, waiting told apart."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs_made import made_status
from tip_ray.contract.run_state import ObservedStatus, RunState, RunStatus
from tip_ray.service.client_jobs import Job, newest_job
from tip_ray.service.client_merge import merged

NOW = 1_000_000.0
ENTRYPOINT = "tip-ray run spec.yaml --run-id a-run --run-root /runs"


def job(state: str, attempt: int = 1, **changes: Any) -> Job:
    """A job that was submitted a minute ago, and has ended five seconds ago if it has."""
    ended = {} if state in ("PENDING", "RUNNING") else {"ended_at": NOW - 5}
    values = {"entrypoint": ENTRYPOINT, "submitted_at": NOW - 60, **ended, **changes}
    return Job(submission_id=f"a-run-a{attempt}", state=state, **values)


def status(
    state: RunState, age_s: float, job_id: str | None = "a-run-a1", **more: Any
) -> RunStatus:
    """A status whose last heartbeat is `age_s` old."""
    times = {"heartbeat_at": NOW - age_s, "updated_at": NOW - age_s, "started_at": NOW - 90}
    return made_status("a-run", state=state, job_id=job_id, step=7, **{**times, **more})


def seen(one: Job | None, other: RunStatus | None) -> ObservedStatus:
    found = merged(one, other, NOW)
    assert found is not None
    return found


RUNNING, FAILED, CANCELLED = RunState.RUNNING, RunState.FAILED, RunState.CANCELLED


@pytest.mark.parametrize(("age_s", "health"), [(3, "live"), (30, "stale"), (300, "lost")])
@pytest.mark.parametrize("one", [job("RUNNING"), None], ids=["process lives", "no job known"])
def test_a_silent_driver_is_stale_then_lost(one: Job | None, age_s: float, health: str) -> None:
    found = seen(one, status(RUNNING, age_s))
    assert (found.state, found.health, found.step) == (RUNNING, health, 7)
    assert found.heartbeat_age_s == age_s


@pytest.mark.parametrize(
    ("code", "named"), [(137, "SIGKILL"), (-9, "SIGKILL"), (139, "SIGSEGV"), (None, "a word;")]
)
def test_a_killed_driver_is_failed_while_its_heartbeat_is_fresh(
    code: int | None, named: str
) -> None:
    found = seen(job("FAILED", exit_code=code), status(RUNNING, 6))
    assert (found.state, found.health, found.step) == (FAILED, "ended", 7)
    assert found.error is not None
    assert found.error.startswith("the driver's process ended without a word")
    assert named in found.error
    assert "\n" not in found.error
    assert found.updated_at == NOW - 5


@pytest.mark.parametrize("state", ["RUNNING", "SUCCEEDED", "FAILED", "STOPPED"])
def test_the_drivers_last_word_stands(state: str) -> None:
    last = status(FAILED, 6, error="a replica died", exit_code=1)
    found = seen(job(state), last)
    assert (found.state, found.error, found.exit_code) == (FAILED, "a replica died", 1)


@pytest.mark.parametrize(("state", "waits"), [("PENDING", "to start"), ("RUNNING", "its driver")])
def test_a_job_without_a_run_directory_is_pending(state: str, waits: str) -> None:
    found = seen(job(state, metadata={"name": "a", "steps": "40"}), None)
    assert (found.state, found.health) == (RunState.PENDING, "live")
    assert (found.run_id, found.name, found.steps) == ("a-run", "a", 40)
    assert waits in (found.waiting_for or "")


def test_a_driver_that_refused_says_why_and_with_which_code() -> None:
    message = "Job entrypoint command failed with exit code 2, last logs:\nerror: field: found x\n"
    found = seen(job("FAILED", exit_code=2, message=message), None)
    assert (found.state, found.error, found.exit_code) == (FAILED, "field: found x", 2)


def test_a_job_that_never_ran_says_what_ray_says() -> None:
    found = seen(job("FAILED", message="Runtime env failed\nat length"), None)
    assert (found.state, found.error) == (FAILED, "job a-run-a1: Runtime env failed")


def test_a_cluster_without_tip_ray_is_told_so() -> None:
    found = seen(job("FAILED", exit_code=127, message="failed\n/bin/sh: tip-ray: not found"), None)
    assert found.exit_code == 127
    assert "no `tip-ray` on the PATH of the cluster's head; install it" in (found.error or "")


def test_a_job_that_was_stopped_before_it_began_is_cancelled() -> None:
    found = seen(job("STOPPED"), None)
    assert (found.state, found.exit_code, found.waiting_for) == (CANCELLED, 130, None)


def test_a_job_that_succeeded_without_a_directory_is_nowhere() -> None:
    assert merged(job("SUCCEEDED"), None, NOW) is None
    assert merged(None, None, NOW) is None


@pytest.mark.parametrize("state", [FAILED, CANCELLED, RUNNING])
def test_a_new_attempt_waits_where_the_old_one_ended(state: RunState) -> None:
    old = status(state, 100, error="an old error", exit_code=130)
    found = seen(job("PENDING", attempt=2), old)
    assert (found.state, found.health, found.step) == (RunState.PENDING, "live", 7)
    assert (found.error, found.exit_code, found.job_id) == (None, None, "a-run-a2")
    assert "a-run-a2" in (found.waiting_for or "")


def test_a_new_attempt_that_was_refused_is_the_runs_failure() -> None:
    refused = job("FAILED", attempt=2, exit_code=2, message="error: seed: found 1, expected 0")
    found = seen(refused, status(CANCELLED, 100))
    assert (found.state, found.exit_code) == (FAILED, 2)
    assert found.error == "seed: found 1, expected 0"


def test_a_run_that_has_succeeded_stays_so() -> None:
    again = job("SUCCEEDED", attempt=2)
    assert seen(again, status(RunState.SUCCEEDED, 100)).state is RunState.SUCCEEDED
    stopped = job("STOPPED", attempt=2)
    assert seen(stopped, status(RunState.SUCCEEDED, 100)).state is RunState.SUCCEEDED


def test_a_driver_outside_of_the_cluster_is_believed() -> None:
    elsewhere = status(RUNNING, 1, job_id=None)
    assert seen(job("FAILED"), elsewhere).state is RUNNING
    assert seen(job("RUNNING"), elsewhere).state is RUNNING


def test_jobs_are_known_by_their_entrypoint_or_by_the_status() -> None:
    first, second = job("FAILED"), job("RUNNING", attempt=2, submitted_at=NOW - 10)
    other = Job("raysubmit_x", "RUNNING", "tip-ray run my.yaml", NOW - 5)
    jobs = [second, first, other]
    assert newest_job(jobs, "a-run") == second
    assert newest_job(jobs, "b-run") is None
    assert newest_job(jobs, "b-run", "raysubmit_x") == other
    assert (first.attempt, second.attempt, other.attempt) == (1, 2, 0)
    assert Job("x", "RUNNING", "tip-ray run s --run-id=a-run && echo", NOW).run_id == "a-run"
    assert (first.run_root, other.run_root) == ("/runs", None)
    assert Job("x", "RUNNING", "echo 'half a quote", NOW).run_id is None
    assert Job("x", "RUNNING", "tip-ray run s --run-id ../up", NOW).run_id is None
