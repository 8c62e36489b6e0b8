"""Metrics as Parquet: one row a step, in parts that are merged and may replace each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from tip_ray.contract.errors import RunDirectoryError
from tip_ray.contract.run_state import StepMetrics


def _schema_of(model: type[BaseModel]) -> pa.Schema:
    """Plain `int` and `float` fields as int64 and float64."""
    kinds: dict[Any, pa.DataType] = {int: pa.int64(), float: pa.float64()}
    return pa.schema(
        [pa.field(name, kinds[field.annotation]) for name, field in model.model_fields.items()]
    )


METRICS_SCHEMA = _schema_of(StepMetrics)

# What became of one rollout: see audit.py.
AUDIT_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("slot", pa.int32(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),  # -1: quarantined
        pa.field("rank", pa.int32(), nullable=False),  # the learner rank; -1: none saw it
        pa.field("epoch", pa.int64(), nullable=False),  # of the driver that wrote it down
        pa.field("outcome", pa.string(), nullable=False),  # trained | nothing_kept | quarantined
    ]
)


def merge_parts(parts: Iterable[pa.Table]) -> pa.Table:
    """Rows of all parts in order of step; for a step that several have, the last part's."""
    rows: dict[int, dict[str, Any]] = {}
    for part in parts:
        rows.update((row["step"], row) for row in part.to_pylist())
    return pa.Table.from_pylist([rows[step] for step in sorted(rows)], schema=METRICS_SCHEMA)


def to_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def from_parquet(content: bytes, name: str) -> pa.Table:
    """Raises RunDirectoryError where `content` is not a whole Parquet file."""
    try:
        return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise RunDirectoryError(f"{name}: not a whole Parquet file ({reason}); delete it") from None
