"""Arrow tables: what conforms, and that slices, offsets and rows mean what they say."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables_made import made_step
from tip_ray.contract import tables
from tip_ray.contract.errors import TableError

K = 3
INT32 = pa.int32()
SCHEMAS = {
    "PROMPTS": tables.PROMPTS,
    "ROLLOUTS": tables.rollouts_schema(K),
    "SCORES": tables.SCORES,
    "TARGETS": tables.targets_schema(K),
    "hidden TARGETS": tables.targets_schema(K, "hidden"),
    "KEEP": tables.KEEP,
    "SELECTED": tables.selected_schema(K),
    "hidden SELECTED": tables.selected_schema(K, "hidden"),
    "SAMPLES": tables.SAMPLES,
    "ANSWERS": tables.ANSWERS,
}


def keyed(rows: int, **columns: Any) -> dict[str, Any]:
    return {
        "step": [1] * rows,
        "slot": list(range(rows)),
        "sample_index": [0] * rows,
        "attempt": [0] * rows,
        "prompt_uid": [f"uid-{row}" for row in range(rows)],
        **columns,
    }


def answers(rows: int, **changes: Any) -> dict[str, Any]:
    values = {"score": [1.0] * rows, "response_tokens": [5] * rows, "truncated": [0] * rows}
    return keyed(rows, **{**values, **changes})


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_table_carries_the_key_and_no_null_inside(name: str) -> None:
    schema = SCHEMAS[name]
    assert tuple(schema.names[:5]) == tables.KEY_COLUMNS
    for field in schema:
        kind = field.type
        if pa.types.is_list(kind):
            assert not kind.value_field.nullable, field.name
            kind = kind.value_type
        if pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        assert not pa.types.is_boolean(kind), "bools are bit-packed: masks are uint8"


def test_only_what_may_be_absent_is_nullable() -> None:
    nullable = {(t, f.name) for t, schema in SCHEMAS.items() for f in schema if f.nullable}
    assert nullable == {
        ("PROMPTS", "teacher_prompt_ids"),
        ("PROMPTS", "answer"),
        ("ROLLOUTS", "teacher_prompt_ids"),
        ("ROLLOUTS", "reward"),
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_the_same_on_the_other_side_of_an_actor_call(name: str) -> None:
    again = pickle.loads(pickle.dumps(tables.empty(SCHEMAS[name])))  # noqa: S301 - our own
    assert again.schema.equals(SCHEMAS[name])


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_empty_table_conforms(name: str) -> None:
    table = tables.empty(SCHEMAS[name])
    assert tables.conform(table, SCHEMAS[name], full=True).num_rows == 0


def test_conform_puts_columns_in_order_and_in_one_chunk() -> None:
    table = tables.build(tables.ANSWERS, answers(3))
    shuffled = table.select(table.column_names[::-1])
    pieces = pa.concat_tables([shuffled.slice(0, 1), shuffled.slice(1)])
    result = tables.conform(pieces, tables.ANSWERS)
    assert result.schema.equals(tables.ANSWERS)
    assert result.column("score").num_chunks == 1
    assert result.equals(table)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.drop_columns(["score"]), "'score': missing"),
        (lambda t: t.append_column("more", t["score"]), "'more': unexpected"),
        (
            lambda t: t.set_column(5, "score", t["score"].cast(pa.float64())),
            "'score': found double, expected float",
        ),
        (
            lambda t: t.set_column(5, "score", pa.array([1.0, None], pa.float32())),
            "'score': 1 nulls, expected none",
        ),
    ],
)
def test_what_does_not_conform_is_named(change: Any, says: str) -> None:
    table = tables.build(tables.ANSWERS, answers(2))
    with pytest.raises(TableError, match=says):
        tables.conform(change(table), tables.ANSWERS)


def test_a_support_of_another_width_does_not_conform() -> None:
    step = made_step(np.random.default_rng(0), k=4)
    with pytest.raises(TableError, match="student_topk_ids"):
        tables.conform(step.rollouts, tables.rollouts_schema(3))


@pytest.mark.parametrize("targets", ["topk", "hidden"])
def test_a_table_says_what_its_targets_are(targets: tables.Targets) -> None:
    for schema in (tables.targets_schema(7, targets), tables.selected_schema(7, targets)):
        assert tables.target_width(tables.empty(schema)) == (7, targets)
    with pytest.raises(TableError, match=r"'support_ids' or 'teacher_hidden': missing"):
        tables.target_width(tables.empty(tables.SCORES))
    flat = pa.table({"teacher_hidden": pa.array([[1]], tables.list_of(pa.uint16()))})
    with pytest.raises(TableError, match=r"'teacher_hidden': found list<.*uint16"):
        tables.target_width(flat)


def test_full_conform_reads_every_offset() -> None:
    kind = tables.list_of(pa.int32())
    bounds = pa.py_buffer(np.array([0, 9, 2], np.int32))
    forged = pa.Array.from_buffers(kind, 2, [None, bounds], children=[pa.array([1, 2], INT32)])
    schema = pa.schema([*tables.KEY_FIELDS, pa.field("ids", kind, nullable=False)])
    key = pa.Table.from_pydict(keyed(2), schema=pa.schema(tables.KEY_FIELDS))
    table = key.append_column(schema.field("ids"), forged)
    with pytest.raises((TableError, pa.ArrowInvalid)):
        tables.conform(table, schema, full=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"score": ["high"] * 2}, "'score'"),
        ({"response_tokens": [2**31, 1]}, "'response_tokens'"),
        ({"truncated": [None, 0]}, "'truncated': 1 nulls"),
        ({"extra": [1, 2]}, "'extra': unexpected"),
    ],
)
def test_build_names_the_column_that_does_not_fit(changes: Any, says: str) -> None:
    with pytest.raises(TableError, match=says):
        tables.build(tables.ANSWERS, answers(2, **changes))


shapes = st.integers(0, 2**32 - 1), st.integers(1, 9), st.data()


@settings(max_examples=60, deadline=None)
@given(seed=shapes[0], rows=shapes[1], data=shapes[2])
def test_columns_and_offsets_of_any_slice_are_its_rows(seed: int, rows: int, data: Any) -> None:
    """Against plain Python lists: scalars, lists, and lists of fixed-size rows."""
    whole = made_step(np.random.default_rng(seed), rows=rows).rollouts
    start = data.draw(st.integers(0, rows))
    table = whole.slice(start, data.draw(st.integers(0, rows - start)))
    plain = table.to_pylist()
    versions = tables.column(table, "weight_version")
    assert versions.tolist() == [row["weight_version"] for row in plain]
    for name in ("response_ids", "student_topk_logprobs"):
        flat, bounds = tables.column(table, name), tables.offsets(table, name)
        assert len(bounds) == table.num_rows + 1
        assert bounds[0] == 0
        for row, values in enumerate(plain):
            assert flat[bounds[row] : bounds[row + 1]].tolist() == values[name]
    assert tables.column(table, "student_topk_ids").shape[1] == 4


@pytest.mark.parametrize("name", ["response_ids", "student_topk_ids", "student_entropy"])
def test_a_list_column_is_rebuilt_from_its_flat_values(name: str) -> None:
    table = made_step(np.random.default_rng(1)).rollouts.slice(2, 3)
    kind = table.schema.field(name).type
    rebuilt = tables.list_array(tables.column(table, name), tables.offsets(table, name), kind)
    assert rebuilt.type == kind
    assert rebuilt.to_pylist() == table.column(name).to_pylist()


def test_a_column_of_one_chunk_is_not_copied_and_not_writable() -> None:
    table = made_step(np.random.default_rng(2)).scores
    values = tables.column(table, "reverse_kl")
    address = table.column("reverse_kl").chunk(0).flatten().buffers()[1].address
    assert values.__array_interface__["data"][0] == address
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(0, 2), st.integers(0, 1), st.integers(0, 3)),
        unique=True,
        max_size=14,
    )
)
def test_only_the_newest_attempt_of_a_key_stays(pieces: list[tuple[int, int, int, int]]) -> None:
    names = ("step", "slot", "sample_index", "attempt")
    columns: dict[str, Any] = {n: [p[i] for p in pieces] for i, n in enumerate(names)}
    columns["prompt_uid"] = [str(piece) for piece in pieces]
    rows = len(pieces)
    made = answers(rows)
    table = tables.build(tables.ANSWERS, {**made, **columns})
    newest: dict[tuple[int, int, int], int] = {}
    for step, slot, sample, attempt in pieces:
        newest[step, slot, sample] = max(attempt, newest.get((step, slot, sample), -1))
    result = tables.newest_attempts(table)
    assert tables.keys(result) == sorted(newest)
    assert result.column("attempt").to_pylist() == [newest[key] for key in sorted(newest)]
    assert result.schema.equals(tables.ANSWERS)


def test_concat_checks_every_part_and_gives_one_chunk() -> None:
    parts = [tables.build(tables.ANSWERS, answers(rows)) for rows in (2, 0, 3)]
    whole = tables.concat(parts, tables.ANSWERS)
    assert whole.num_rows == 5
    assert whole.column("score").num_chunks == 1
    assert tables.concat([], tables.ANSWERS).schema.equals(tables.ANSWERS)
    with pytest.raises(TableError, match="'score': missing"):
        tables.concat([parts[0], parts[1].drop_columns(["score"])], tables.ANSWERS)


def test_bytes_of_a_slice_are_its_own() -> None:
    table = made_step(np.random.default_rng(3), rows=8).rollouts
    halves = [tables.nbytes(table.slice(0, 4)), tables.nbytes(table.slice(4))]
    assert 0 < min(halves) < tables.nbytes(table)
    # Each slice counts one closing offset (4 bytes) a list column of its own.
    assert sum(halves) == pytest.approx(tables.nbytes(table), abs=4 * 2 * len(table.schema))
    assert tables.nbytes(table, without=["student_topk_ids"]) < tables.nbytes(table)
