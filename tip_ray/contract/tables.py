"""The Arrow tables between the stages, and the few helpers that read and write them.

One row is one rollout of `m` response tokens. Every table carries the key (step, slot,
sample_index, attempt) and `prompt_uid`: slot is the prompt's place in the step, so a prompt drawn
twice in one step stays two things. Log-probabilities, entropies and divergences are in nats, over
the vocabulary that student and teacher share, at temperature 1.

K  width of the student's support        W  width of the target support (K, or 2K for a union)
m  response tokens of a row              k  kept tokens of a row
D  width of the teacher's hidden state
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tip_ray.contract.errors import TableError

TOP_SHOWN = 5  # alternatives shown per token in samples/ and on the page

Key = tuple[int, int, int]  # (step, slot, sample_index): one piece of work, whatever the attempt
Targets = Literal["topk", "hidden"]  # teacher.targets

INT32, INT64, FLOAT32, UINT8 = pa.int32(), pa.int64(), pa.float32(), pa.uint8()
BFLOAT16 = pa.uint16()  # its bits: Arrow has no such type
STRING = pa.string()


def _field(name: str, kind: pa.DataType, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable)


def list_of(kind: pa.DataType) -> pa.ListType:
    """A list whose items are never null."""
    return pa.list_(pa.field("item", kind, nullable=False))


def rows_of(kind: pa.DataType, width: int) -> pa.ListType:
    """list<fixed_size_list<kind, width>>: `width` values for each token of a row."""
    # The innermost values are never null either, but pyarrow's pickle (so Ray) forgets that of a
    # fixed-size list: a type that says so would come out of an actor call as another type.
    return list_of(pa.list_(kind, width))


KEY_FIELDS = (
    _field("step", INT64),
    _field("slot", INT32),
    _field("sample_index", INT32),
    _field("attempt", INT32),
    _field("prompt_uid", STRING),
)
KEY_COLUMNS = tuple(field.name for field in KEY_FIELDS)


def _schema(*fields: pa.Field) -> pa.Schema:
    return pa.schema([*KEY_FIELDS, *fields])


# source -> rollout. One row is one rollout to make, so a retry asks for just what is missing.
PROMPTS = _schema(
    _field("prompt_ids", list_of(INT32)),
    _field("teacher_prompt_ids", list_of(INT32), nullable=True),  # null: the same as prompt_ids
    _field("answer", STRING, nullable=True),
    _field("source", STRING),
)


def rollouts_schema(k: int) -> pa.Schema:
    """rollout -> teacher, cut. `k` is the width of the student's top-K support."""
    return _schema(
        _field("prompt_ids", list_of(INT32)),
        _field("teacher_prompt_ids", list_of(INT32), nullable=True),
        _field("response_ids", list_of(INT32)),
        _field("loss_mask", list_of(UINT8)),  # [m]; 0 = a tool or environment token
        _field("student_logprob", list_of(FLOAT32)),  # [m]; of the sampled token
        _field("student_entropy", list_of(FLOAT32)),  # [m]; exact, full shared vocabulary
        _field("student_topk_ids", rows_of(INT32, k)),  # [m, K]; most probable first
        _field("student_topk_logprobs", rows_of(FLOAT32, k)),  # [m, K]
        _field("student_tail_logprob", list_of(FLOAT32)),  # [m]; logsumexp outside; -inf if K = V
        _field("weight_version", INT64),
        _field("finish_reason", STRING),  # stop | length
        _field("reward", FLOAT32, nullable=True),
    )


# teacher -> selector. Scalars only: 17 bytes a token.
SCORES = _schema(
    _field("student_entropy", list_of(FLOAT32)),  # [m]
    _field("reverse_kl", list_of(FLOAT32)),  # [m]; KL(S||T) on the student's support with its tail
    _field("forward_kl", list_of(FLOAT32)),  # [m]; KL(T||S), likewise
    _field("teacher_entropy", list_of(FLOAT32)),  # [m]; exact
    _field("loss_mask", list_of(UINT8)),  # [m]
)


def _target_fields(width: int, targets: Targets) -> tuple[pa.Field, ...]:
    """What the loss compares the student with, for each token."""
    if targets == "hidden":
        return (_field("teacher_hidden", rows_of(BFLOAT16, width)),)  # [m, D]; after the final norm
    return (
        _field("support_ids", rows_of(INT32, width)),  # [m, W]; -1 = padding of a union
        _field("teacher_logprobs", rows_of(FLOAT32, width)),  # [m, W]; -inf at padding
        _field("teacher_tail_logprob", list_of(FLOAT32)),  # [m]
    )


def target_width(table: pa.Table) -> tuple[int, Targets]:
    """(W, "topk") or (D, "hidden") of a TARGETS or SELECTED table.

    Raises:
        TableError: it has no targets, or they are of another type.
    """
    columns: dict[Targets, str] = {"hidden": "teacher_hidden", "topk": "support_ids"}
    for targets, name in columns.items():
        if name in table.column_names:
            kind = table.schema.field(name).type
            if not pa.types.is_list(kind) or not pa.types.is_fixed_size_list(kind.value_type):
                raise TableError(f"column {name!r}: found {kind}, expected rows of a fixed size")
            return int(kind.value_type.list_size), targets
    raise TableError("column 'support_ids' or 'teacher_hidden': missing; the producer must fill it")


def targets_schema(width: int, targets: Targets = "topk") -> pa.Schema:
    """Stays on the teacher's node. `width` is W, or D with `targets` hidden."""
    return _schema(
        *_target_fields(width, targets),
        _field("teacher_sampled_logprob", list_of(FLOAT32)),  # [m]
        _field("teacher_top_ids", rows_of(INT32, TOP_SHOWN)),  # [m, 5]; for samples/; -1 if V < 5
        _field("teacher_top_logprobs", rows_of(FLOAT32, TOP_SHOWN)),  # [m, 5]
    )


# selector -> cut.
KEEP = _schema(
    _field("kept", list_of(INT32)),  # [k]; response positions, ascending
    # [k]; what the token's divergence is multiplied with: normalisation included, so that the
    # step's loss is the plain sum over all kept tokens of all ranks.
    _field("weight", list_of(FLOAT32)),
    _field("rank", INT32),  # the learner rank that trains on the row; -1: no token weighs
    _field("quadrant", list_of(UINT8)),  # [m]; 1..4, 0 where loss_mask is 0
    _field("shown", UINT8),  # 1: the row goes to samples/
)


def selected_schema(width: int, targets: Targets = "topk") -> pa.Schema:
    """cut -> one learner rank. `width` as in `targets_schema`; policy_gradient: the sampled id."""
    return _schema(
        # prompt and response, up to the last input that a kept token needs
        _field("input_ids", list_of(INT32)),
        # [k]; index into input_ids of the input whose logits predict the kept token
        _field("kept_positions", list_of(INT32)),
        _field("kept_weight", list_of(FLOAT32)),  # [k]
        *_target_fields(width, targets),  # as in TARGETS, [k]
        _field("sampled_ids", list_of(INT32)),  # [k]
        _field("student_logprob", list_of(FLOAT32)),  # [k]; recorded at rollout, sampled token
        _field("weight_version", INT64),
    )


# cut -> the run directory: a few whole rollouts a step.
SAMPLES = _schema(
    _field("prompt_ids", list_of(INT32)),
    _field("response_ids", list_of(INT32)),
    _field("loss_mask", list_of(UINT8)),
    _field("student_entropy", list_of(FLOAT32)),
    _field("teacher_entropy", list_of(FLOAT32)),
    _field("reverse_kl", list_of(FLOAT32)),
    _field("forward_kl", list_of(FLOAT32)),
    _field("student_logprob", list_of(FLOAT32)),
    _field("teacher_logprob", list_of(FLOAT32)),
    _field("kept", list_of(UINT8)),  # [m]; 1: the learner saw it
    _field("quadrant", list_of(UINT8)),
    _field("student_top_ids", rows_of(INT32, TOP_SHOWN)),  # -1 where the support is narrower
    _field("student_top_logprobs", rows_of(FLOAT32, TOP_SHOWN)),
    _field("teacher_top_ids", rows_of(INT32, TOP_SHOWN)),
    _field("teacher_top_logprobs", rows_of(FLOAT32, TOP_SHOWN)),
    _field("weight_version", INT64),
    _field("finish_reason", STRING),
)

# rollout -> evaluation. Text is scored where it was made; only the verdict travels.
ANSWERS = _schema(
    _field("score", FLOAT32),  # 0 or 1
    _field("response_tokens", INT32),
    _field("truncated", UINT8),
)


def conform(table: pa.Table, schema: pa.Schema, *, full: bool = False) -> pa.Table:
    """`table` with exactly the columns of `schema`, in its order, in contiguous chunks.

    `full` also validates every offset and value: for tables that come from outside.

    Raises:
        TableError: a column is missing, unexpected, of another type, or null where it may not be.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise TableError(f"column {missing[0]!r}: missing; the producer must fill it")
    extra = [name for name in table.column_names if name not in schema.names]
    if extra:
        raise TableError(f"column {extra[0]!r}: unexpected; drop it before it travels")
    for field in schema:
        column = table.column(field.name)
        if column.type != field.type:
            raise TableError(f"column {field.name!r}: found {column.type}, expected {field.type}")
        if not field.nullable and column.null_count:
            raise TableError(f"column {field.name!r}: {column.null_count} nulls, expected none")
    if full:
        table.validate(full=True)
    return table.select(schema.names).combine_chunks().cast(schema)


def build(schema: pa.Schema, columns: dict[str, Any]) -> pa.Table:
    """A table of `schema` from arrays or Python lists by column name.

    Raises:
        TableError: as `conform`, or a value does not fit its column's type.
    """
    arrays = {}
    for name, values in columns.items():
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            arrays[name] = values
            continue
        try:
            arrays[name] = pa.array(values, type=schema.field(name).type)
        except KeyError:
            raise TableError(f"column {name!r}: unexpected; drop it before it travels") from None
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise TableError(f"column {name!r}: {error}") from None
    return conform(pa.table(arrays), schema)


def empty(schema: pa.Schema) -> pa.Table:
    """A table of `schema` without rows."""
    return schema.empty_table()


def column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """All values of a column, flattened: scalars [rows], lists [tokens], list-of-rows [tokens, W].

    Zero-copy and read-only where the column is one chunk; a sliced table gives its slice only.
    """
    array = _one_chunk(table, name)
    width = None
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        if pa.types.is_fixed_size_list(array.type):
            width = array.type.list_size
        array = array.flatten()  # unlike .values, it respects a slice's offset
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values if width is None else values.reshape(-1, width)


def offsets(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """[rows + 1]: row i of list column `name` is `column(table, name)[o[i]:o[i + 1]]`."""
    array = _one_chunk(table, name)
    raw = array.offsets.to_numpy().astype(np.int64)
    return raw - raw[0] if len(raw) else np.zeros(1, np.int64)


def list_array(
    values: npt.NDArray[Any], row_offsets: Sequence[int] | npt.NDArray[Any], kind: pa.DataType
) -> pa.ListArray:
    """The inverse of `column` and `offsets`: a list column of type `kind` from flat values."""
    item = kind.value_type
    if pa.types.is_fixed_size_list(item):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), type=item.value_type)
        inner: pa.Array = pa.FixedSizeListArray.from_arrays(flat, type=item)
    else:
        inner = pa.array(np.ascontiguousarray(values), type=item)
    return pa.ListArray.from_arrays(pa.array(row_offsets, type=INT32), inner, type=kind)


def keys(table: pa.Table) -> list[Key]:
    """(step, slot, sample_index) of each row."""
    columns = (table.column(name).to_pylist() for name in ("step", "slot", "sample_index"))
    return list(zip(*columns, strict=True))


def tried(table: pa.Table) -> tuple[tuple[int, int, int], ...]:
    """(slot, sample_index, attempt) of each row."""
    columns = (table.column(name).to_pylist() for name in ("slot", "sample_index", "attempt"))
    return tuple(zip(*columns, strict=True))


def newest_attempts(table: pa.Table) -> pa.Table:
    """`table` with one row a key, that of the highest attempt, in order of the key."""
    best: dict[Key, tuple[int, int]] = {}
    for row, (key, attempt) in enumerate(
        zip(keys(table), table.column("attempt").to_pylist(), strict=True)
    ):
        if key not in best or attempt > best[key][0]:
            best[key] = (attempt, row)
    rows = pa.array([best[key][1] for key in sorted(best)], INT64)  # typed: take refuses null
    return table.take(rows).combine_chunks()


def concat(tables: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """All rows of `tables` as one contiguous table of `schema`."""
    conformed = [conform(table, schema) for table in tables]
    return pa.concat_tables(conformed).combine_chunks() if conformed else empty(schema)


def nbytes(table: pa.Table, without: Sequence[str] = ()) -> int:
    """Bytes of the table's own rows (a slice counts as its slice)."""
    return int(table.drop_columns(list(without)).nbytes)


def _one_chunk(table: pa.Table, name: str) -> pa.Array:
    chunked = table.column(name)
    if chunked.num_chunks == 1:
        return chunked.chunk(0)
    return chunked.combine_chunks() if chunked.num_chunks else pa.array([], type=chunked.type)
