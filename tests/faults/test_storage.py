"""A run directory that cannot be written: for a moment, it costs nothing; for longer, the run."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from tests.faults.jobs import unwritable
from tests.jobs.harness import quickstart
from tip_ray.contract.errors import LeaseLostError, RunFailedError
from tip_ray.contract.run_state import RunState
from tip_ray.control.journal import Journal
from tip_ray.control.lease import begin
from tip_ray.control.progress import SilentProgress
from tip_ray.control.run_reader import RunReader


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    lease = begin(quickstart(run_root=str(tmp_path)), "one")
    lease.claim(quickstart())
    return Journal(lease.directory, lease.status, SilentProgress(), None, None)


def test_a_hiccup_is_waited_out(journal: Journal, tmp_path: Path) -> None:
    away = unwritable(tmp_path / "one")
    away.__enter__()
    back = threading.Timer(0.5, lambda: away.__exit__(None, None, None))
    back.start()
    asyncio.run(journal.state(RunState.STARTING))
    back.join()
    journal.end(RunState.CANCELLED)
    reader = RunReader(str(tmp_path / "one"))
    assert reader.read_status().state is RunState.CANCELLED
    assert [event["state"] for event in reader.read_events()] == ["STARTING", "CANCELLED"]


def test_what_lasts_fails_the_run_and_hangs_nothing(journal: Journal, tmp_path: Path) -> None:
    with unwritable(tmp_path / "one"):
        with pytest.raises(RunFailedError, match=r"cannot be read.*same --run-id") as caught:
            asyncio.run(journal.state(RunState.STARTING))
        assert caught.value.exit_code == 1
        for _ in range(20):
            journal.event("fault")  # not waited for one by one
        with pytest.raises(RunFailedError):
            journal.end(RunState.FAILED, str(caught.value))
    assert RunReader(str(tmp_path / "one")).read_status().state is RunState.PENDING


def test_a_lost_lease_is_not_waited_for(journal: Journal) -> None:
    other = journal.status.model_copy(update={"epoch": 2, "driver": "another"})
    journal.directory.storage.write("status.json", other.model_dump_json().encode())
    with pytest.raises(LeaseLostError, match="taken over"):
        asyncio.run(journal.state(RunState.STARTING))
