"""A short part of the kill loop, and runs that faults end until their cause is gone."""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults.chaos import Chaos
from tests.faults.jobs import START_S, Job
from tip_ray.contract.run_state import RunState

TIMES_OUT_S = 300.0


def test_nothing_is_lost_and_nothing_doubled(tmp_path: Path) -> None:
    lines: list[str] = []
    chaos = Chaos(tmp_path, 3, lines.append)
    kinds = ["kill rollout", "kill learner", "kill driver", "storage hiccup"]
    chaos.private(time.monotonic() + TIMES_OUT_S, kinds, steps=16)
    assert chaos.good, "\n".join([*lines, chaos.table()])
    assert sum(one.lost + one.doubled for one in chaos.tally.values()) == 0
    assert chaos.tally["poisonous prompt"].recovered == 1
    assert chaos.tally["non-finite loss"].recovered == 1
    assert any(chaos.tally[kind].times for kind in kinds)


def test_a_failed_run_goes_on_once_the_cause_is_gone(tmp_path: Path) -> None:
    job = Job(tmp_path, "failing", {"steps": 6, "faults.max_skipped_updates": 2})
    poison = {"TIP_TEST_POISON": ",".join(f"3:{slot}" for slot in range(4))}
    assert _ended(job, poison) == (
        1,
        "error: step 3: 16 of 32 rollouts quarantined, more than faults.max_quarantined_fraction; "
        "first: token id 1000000 is outside the vocabulary of 15",
    )
    code, line = _ended(job, {"TIP_TEST_NONFINITE": "4,5"})
    assert code == 1
    assert line.startswith("error: step 5: 2 updates in a row had a non-finite loss or gradient;")
    status = job.status()
    assert status is not None
    assert status.state is RunState.FAILED
    assert status.error == line.removeprefix("error: ")
    code, _ = _ended(job, {})
    assert code == 0
    assert job.check().exactly_once
    metrics = job.reader.read_metrics().to_pylist()
    assert [row["update_skipped"] for row in metrics] == [0] * 6


def _ended(job: Job, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and last line of a run with these faults inside."""
    job.environment = environment
    job.start()
    code = job.finish(START_S + TIMES_OUT_S)
    return code, job.output.read_text().splitlines()[-1]
