"""What a run may become, and when a silent one is no longer believed."""

from __future__ import annotations

import itertools

import pytest

from tip_ray.contract.errors import TransitionError
from tip_ray.contract.run_state import (
    LOST_AFTER_S,
    STALE_AFTER_S,
    RunState,
    RunStatus,
    check_transition,
    observe,
)

LEGAL = {
    ("PENDING", "STARTING"),
    ("STARTING", "RUNNING"),
    ("RUNNING", "RECOVERING"),
    ("RECOVERING", "RUNNING"),
    ("RUNNING", "SUCCEEDED"),
    ("FAILED", "STARTING"),
    ("CANCELLED", "STARTING"),
    *itertools.product(["PENDING", "STARTING", "RUNNING", "RECOVERING"], ["FAILED", "CANCELLED"]),
}


@pytest.mark.parametrize(("old", "new"), itertools.product(RunState, RunState))
def test_a_run_changes_only_as_designed(old: RunState, new: RunState) -> None:
    if (old.value, new.value) in LEGAL:
        check_transition(old, new)
        return
    with pytest.raises(TransitionError, match=f"{old} -> {new} is illegal"):
        check_transition(old, new)


def test_three_states_are_ends() -> None:
    assert {state.value for state in RunState if state.ended} == {
        "SUCCEEDED",
        "FAILED",
        "CANCELLED",
    }


@pytest.mark.parametrize(
    ("state", "age_s", "health"),
    [
        (RunState.RUNNING, 0.0, "live"),
        (RunState.RUNNING, STALE_AFTER_S - 0.1, "live"),
        (RunState.RUNNING, STALE_AFTER_S, "stale"),
        (RunState.STARTING, LOST_AFTER_S - 0.1, "stale"),
        (RunState.RECOVERING, LOST_AFTER_S, "lost"),
        (RunState.FAILED, LOST_AFTER_S, "ended"),
        (RunState.SUCCEEDED, 0.0, "ended"),
    ],
)
def test_health_follows_the_heartbeat(state: RunState, age_s: float, health: str) -> None:
    times = {"started_at": 1000.0, "updated_at": 1000.0, "heartbeat_at": 1000.0}
    status = RunStatus(run_id="a", name="a", steps=1, state=state, **times)
    now = 1000.0 + age_s
    assert status.health_at(now) == health
    seen = observe(status, now)
    assert (seen.health, seen.heartbeat_age_s) == (health, pytest.approx(age_s))
    assert RunStatus.model_validate(seen.model_dump()) == status
    assert observe(seen, now) == seen


def test_a_clock_that_is_behind_makes_no_heartbeat_of_the_future() -> None:
    times = {"started_at": 1.0, "updated_at": 1.0, "heartbeat_at": 1000.0}
    seen = observe(RunStatus(run_id="a", name="a", steps=1, **times), now=999.0)
    assert (seen.health, seen.heartbeat_age_s) == ("live", 0.0)


def test_a_status_of_a_newer_release_is_still_read() -> None:
    times = {"started_at": 1.0, "updated_at": 1.0, "heartbeat_at": 1.0}
    status = RunStatus.model_validate({"run_id": "a", "name": "a", "steps": 1, **times, "new": 1})
    assert RunStatus.model_validate_json(status.model_dump_json()) == status
