"""Metrics as Parquet: one row a step, in parts that are merged and may replace each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
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


# A column's name that is not UTF-8 is a ValueError, one that is there twice a KeyError.
_BROKEN = (pa.ArrowException, OSError, ValueError, KeyError)


def merge_parts(parts: Iterable[pa.Table]) -> pa.Table:
    """METRICS_SCHEMA: the rows of all parts in order of step; for a step that several have, the
    last part's. A column that another release did not have is null.

    Raises:
        RunDirectoryError: a part is not of metrics.
    """
    rows = pa.concat_tables([METRICS_SCHEMA.empty_table(), *map(_as_metrics, parts)])
    rows = rows.combine_chunks()
    steps = rows.column("step").to_numpy()
    if (np.diff(steps) > 0).all():
        return rows
    # of equal steps np.unique takes the first: from the back, that is the last part's
    _, from_back = np.unique(steps[::-1], return_index=True)
    return rows.take(pa.array(len(steps) - 1 - from_back))


def metrics_part(content: bytes, name: str) -> pa.Table:
    """One part, as METRICS_SCHEMA; raises RunDirectoryError where it is broken."""
    return _as_metrics(from_parquet(content, name), name)


def _as_metrics(table: pa.Table, name: str = "a part of metrics") -> pa.Table:
    if table.schema.equals(METRICS_SCHEMA) and not table.column("step").null_count:
        return table
    try:
        columns = [_column(table, field) for field in METRICS_SCHEMA]
        if columns[0].null_count:
            raise pa.ArrowInvalid("a row without a step")
        return pa.table(columns, schema=METRICS_SCHEMA)
    except _BROKEN as error:
        reason = " ".join(str(error).split())
        raise RunDirectoryError(f"{name}: not metrics ({reason}); delete it") from None


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    if field.name in table.column_names:
        return table.column(field.name).cast(field.type)
    return pa.nulls(table.num_rows, field.type)


def to_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def from_parquet(content: bytes, name: str) -> pa.Table:
    """Raises RunDirectoryError where `content` is not a whole Parquet file."""
    try:
        return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except _BROKEN as error:
        reason = " ".join(str(error).split())
        raise RunDirectoryError(f"{name}: not a whole Parquet file ({reason}); delete it") from None
