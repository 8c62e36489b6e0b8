"""The audit says what was lost and what was doubled; it does not take the driver's word."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.jobs.harness import quickstart
from tip_ray.contract.headers import LearnerReport, Quarantined, Tried
from tip_ray.contract.run_state import RunStatus
from tip_ray.control.audit import check_audit, step_audit
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader

SPEC = quickstart(steps=3, prompts__prompts_per_step=3, rollout__samples_per_prompt=2)
ALL = [(slot, sample, 0) for slot, sample in product(range(3), range(2))]


def report(*trained: Tried) -> LearnerReport:
    return LearnerReport(1, 0.1, 0.1, 0.1, False, 1, 1, 0.0, 0.0, 1, 0.1, trained=trained)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """Two of three steps, each rollout once: by two ranks, kept nothing of, or quarantined."""
    directory = RunDirectory.create(str(tmp_path), "one", SPEC)
    times = {"started_at": 1.0, "updated_at": 1.0, "heartbeat_at": 1.0}
    directory.write_status(RunStatus(run_id="one", name="one", step=2, steps=3, **times))
    refused = Quarantined((1, *ALL[5][:2]), "uid", "rollout", "poison")
    reports = [report(*ALL[:3]), report(ALL[3])]
    directory.write_audit(1, step_audit(1, 1, reports, [ALL[4]], [refused]))
    directory.write_audit(2, step_audit(2, 2, [report(*ALL)], [], []))
    return directory


def test_each_once(directory: RunDirectory) -> None:
    reader = RunReader(directory.url)
    assert check_audit(reader, SPEC).exactly_once
    audit = reader.read_audit().to_pylist()
    ended = [(row["outcome"], row["rank"], row["epoch"]) for row in audit]
    assert ended[2:6] == [
        ("trained", 0, 1),
        ("trained", 1, 1),
        ("nothing_kept", -1, 1),
        ("quarantined", -1, 1),
    ]


def test_what_no_rank_saw_is_lost(directory: RunDirectory) -> None:
    directory.write_audit(2, step_audit(2, 1, [report(*ALL[:2], *ALL[3:])], [], []))
    result = check_audit(RunReader(directory.url), SPEC)
    assert result.lost == ((2, 1, 0),)
    assert result.doubled == ()


def test_a_step_without_audit_is_lost_whole(directory: RunDirectory) -> None:
    directory.storage.delete("audit/step-00000001.parquet")
    assert len(check_audit(RunReader(directory.url), SPEC).lost) == len(ALL)


@pytest.mark.parametrize("again", [(0, 0, 0), (0, 0, 1), (3, 0, 0)])
def test_twice_or_unasked_is_doubled(directory: RunDirectory, again: Tried) -> None:
    reports = [report(*ALL), report(again)]
    directory.write_audit(2, step_audit(2, 1, reports, [], []))
    result = check_audit(RunReader(directory.url), SPEC)
    assert result.doubled == ((2, *again[:2]),)
    assert result.lost == ()


def test_the_audit_beyond_a_restored_step_is_forgotten(directory: RunDirectory) -> None:
    directory.forget_after(1)
    assert set(RunReader(directory.url).read_audit().column("step").to_pylist()) == {1}
