"""Parts of metrics merge as a dict by step would, whatever release wrote them."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest

from tests.runs_made import made_metrics
from tip_ray.contract.errors import RunDirectoryError
from tip_ray.control.metrics_parts import METRICS_SCHEMA, merge_parts, metrics_part, to_parquet


def part(steps: list[int], losses: list[float]) -> pa.Table:
    rows = [
        made_metrics(step, loss=loss).model_dump() for step, loss in zip(steps, losses, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=METRICS_SCHEMA)


@pytest.mark.parametrize("seed", range(10))
def test_the_last_part_that_has_a_step_wins(seed: int) -> None:
    rng = random.Random(seed)
    drawn = [
        [rng.randint(1, 12) for _ in range(rng.randint(0, 8))] for _ in range(rng.randint(0, 5))
    ]
    parts = [part(steps, [rng.random() for _ in steps]) for steps in drawn]
    rows: dict[int, dict[str, Any]] = {}
    for one in parts:
        rows.update((row["step"], row) for row in one.to_pylist())
    merged = merge_parts(parts)
    assert merged.schema == METRICS_SCHEMA
    assert merged.to_pylist() == [rows[step] for step in sorted(rows)]


def test_a_part_of_another_release_has_the_columns_that_are_known() -> None:
    other = part([1, 2], [0.5, 0.25]).drop(["lag"]).append_column("new", pa.array([1, 2]))
    merged = merge_parts([other, part([3], [0.125])])
    assert merged.column("lag").to_pylist() == [None, None, 1]
    assert merged.column("loss").to_pylist() == [0.5, 0.25, 0.125]
    assert "new" not in merged.column_names


@pytest.mark.parametrize(
    "table",
    [pa.table({"loss": [0.5]}), pa.table({"step": ["one"]}), pa.table({"step": [1, None]})],
    ids=["no step", "no number", "null step"],
)
def test_a_table_of_something_else_is_refused_by_its_name(table: pa.Table) -> None:
    with pytest.raises(RunDirectoryError, match=r"metrics/a\.parquet: not metrics .*; delete it"):
        metrics_part(to_parquet(table), "metrics/a.parquet")
