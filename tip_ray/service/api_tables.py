"""Arrow tables on the wire: thinned, as JSON by columns, or as an Arrow stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic_core import PydanticSerializationError, to_json

from tip_ray.contract.errors import RunDirectoryError, SpecError


def chosen(table: pa.Table, after_step: int, columns: str | None) -> pa.Table:
    """Rows of later steps than `after_step`, and of the comma-separated `columns`, with the step.

    Raises:
        SpecError: there is no such column.
    """
    if after_step > 0:
        table = table.filter(pc.greater(table.column("step"), after_step))
    if columns is None:
        return table
    names = ["step", *(name for name in dict.fromkeys(columns.split(",")) if name != "step")]
    for name in names:
        if name not in table.column_names:
            raise SpecError("columns", repr(name[:60]), "names of metrics", "leave it out for all")
    return table.select(names)


def thinned(table: pa.Table, max_points: int) -> pa.Table:
    """At most `max_points` rows, evenly spread, the first and the last among them."""
    if table.num_rows <= max_points:
        return table
    rows = np.linspace(0, table.num_rows - 1, max_points).round().astype(np.int64)
    if max_points == 1:
        rows[0] = table.num_rows - 1
    return table.take(pa.array(rows))


def columns_of(table: pa.Table) -> dict[str, list[Any]]:
    return {name: _values(table.column(name)) for name in table.column_names}


def _values(column: pa.ChunkedArray) -> list[Any]:
    # numpy makes plain numbers many times faster, but has no integer that is null
    return list(column.to_pylist() if column.null_count else column.to_numpy().tolist())


def arrow_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def json_bytes(value: Any) -> bytes:
    """Whatever a file of a run may hold; a number that is not finite becomes null.

    Raises:
        RunDirectoryError: half a character, say.
    """
    try:
        return to_json(value, inf_nan_mode="null", bytes_mode="base64", serialize_unknown=True)
    except (PydanticSerializationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunDirectoryError(f"found what JSON cannot say ({reason}); delete the file") from None
