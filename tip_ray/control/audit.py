"""What became of every rollout, in the words of those who know; and whether that is exactly once.

A learner rank says what it trained, the selector of which rollouts nothing was kept, and the
actors what they refused. The driver's own bookkeeping is not asked: it is what is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pyarrow as pa

from tip_ray.contract.headers import LearnerReport, Quarantined, Tried
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.tables import Key
from tip_ray.control.metrics_parts import AUDIT_SCHEMA
from tip_ray.control.run_reader import RunReader


@dataclass(frozen=True)
class AuditResult:
    """What should be there and is not, and what is there more often than it should."""

    lost: tuple[Key, ...]
    doubled: tuple[Key, ...]

    @property
    def exactly_once(self) -> bool:
        return not self.lost and not self.doubled


def step_audit(
    step: int,
    epoch: int,
    reports: Sequence[LearnerReport],
    nothing_kept: Sequence[Tried],
    quarantined: Sequence[Quarantined],
) -> pa.Table:
    """AUDIT_SCHEMA: one row for each time that a rollout of `step` was dealt with.

    Args:
        epoch: of the driver.
        reports: of all ranks, in their order.
    """
    rows = [
        (*one, rank, "trained") for rank, report in enumerate(reports) for one in report.trained
    ]
    rows += [(*one, -1, "nothing_kept") for one in nothing_kept]
    rows += [(*item.key[1:], -1, -1, "quarantined") for item in quarantined]
    names = ("slot", "sample_index", "attempt", "rank", "outcome")
    known = [dict(zip(names, row, strict=True)) for row in sorted(rows)]
    return pa.Table.from_pylist(
        [{"step": step, "epoch": epoch, **row} for row in known], schema=AUDIT_SCHEMA
    )


def check_audit(reader: RunReader, spec: RunSpec) -> AuditResult:
    """Whether every (step, slot, sample) up to the run's last step is there exactly once.

    One that nobody asked for counts as doubled.

    Raises:
        NotFoundError, RunDirectoryError: the run directory cannot be read.
    """
    table = reader.read_audit()
    columns = (table.column(name).to_pylist() for name in ("step", "slot", "sample_index"))
    found: Counter[Key] = Counter(zip(*columns, strict=True))
    steps = range(1, reader.read_status().step + 1)
    slots = range(spec.prompts.prompts_per_step)
    expected = set(product(steps, slots, range(spec.rollout.samples_per_prompt)))
    doubled = {key for key, times in found.items() if times > 1} | (found.keys() - expected)
    return AuditResult(tuple(sorted(expected - found.keys())), tuple(sorted(doubled)))
