from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tip_ray.compute.packing import (
    empty_micro_batch,
    length_buckets,
    micro_batches,
    pad_right,
    to_tensor,
)
from tip_ray.contract.errors import SpecError, TableError
from tip_ray.contract.tables import build, column, list_array, offsets, selected_schema

WIDTH = 3


def selected(rows):
    """A SELECTED table of (slot, length, kept positions); every value tells where it is from."""
    schema = selected_schema(WIDTH)
    lengths = [length for _, length, _ in rows]
    kept = [np.asarray(positions, np.int32) for _, _, positions in rows]
    kept_ends = np.cumsum([0, *map(len, kept)])
    slot_N = np.repeat([slot for slot, _, _ in rows], [len(k) for k in kept]).astype(np.int64)
    position_N = np.concatenate(kept) if kept else np.zeros(0, np.int32)
    mark_N = slot_N * 1000 + position_N
    inputs = [slot * 1000 + np.arange(length) for slot, length, _ in rows]
    flat = {
        "kept_positions": position_N,
        "kept_weight": mark_N.astype(np.float32),
        "support_ids": np.stack([mark_N, mark_N + 1, np.full_like(mark_N, -1)], 1).astype(np.int32),
        "teacher_logprobs": -np.stack([mark_N] * WIDTH, 1).astype(np.float32),
        "teacher_tail_logprob": -mark_N.astype(np.float32),
        "sampled_ids": mark_N.astype(np.int32),
        "student_logprob": -2 * mark_N.astype(np.float32),
    }
    columns = {
        name: list_array(values, kept_ends, schema.field(name).type)
        for name, values in flat.items()
    }
    ids = np.concatenate(inputs) if inputs else np.zeros(0)
    kind = schema.field("input_ids").type
    columns["input_ids"] = list_array(ids.astype(np.int32), np.cumsum([0, *lengths]), kind)
    slots = [slot for slot, _, _ in rows]
    columns |= {"step": [1] * len(rows), "slot": slots, "sample_index": [0] * len(rows)}
    columns |= {"attempt": [0] * len(rows), "prompt_uid": ["u"] * len(rows)}
    return build(schema, columns | {"weight_version": [0] * len(rows)})


@st.composite
def row_lists(draw):
    rows = []
    for slot in range(draw(st.integers(0, 7))):
        length = draw(st.integers(1, 30))
        positions = draw(st.sets(st.integers(0, length - 1), max_size=6))
        rows.append((slot, length, sorted(positions)))
    return rows


def content(batches):
    """What each kept token carries, by its input, whatever the packing."""
    found = {}
    for batch in batches:
        flat = batch.input_ids_BT.flatten()
        for n, at in enumerate(batch.kept_rows_N.tolist()):
            values = (
                batch.targets.ids_NK[n].tolist(),
                batch.targets.logprobs_NK[n].tolist(),
                batch.targets.tail_N[n].item(),
                batch.weight_N[n].item(),
                batch.sampled_ids_N[n].item(),
                batch.student_logprob_N[n].item(),
            )
            assert flat[at].item() not in found
            found[flat[at].item()] = values
    return found


@settings(max_examples=60, deadline=None)
@given(row_lists(), st.integers(1, 64))
def test_every_kept_token_travels_once_within_the_budget(rows, max_tokens):
    batches = micro_batches(selected(rows), max_tokens)
    with_kept = [row for row in rows if row[2]]
    assert sum(batch.tokens for batch in batches) == sum(length for _, length, _ in with_kept)
    for batch in batches:
        assert batch.input_ids_BT.numel() <= max_tokens or len(batch.input_ids_BT) == 1
        assert batch.targets.ids_NK.dtype == torch.int64
        for name in ("input_ids_BT", "kept_rows_N", "sampled_ids_N"):
            assert getattr(batch, name).dtype == torch.int64
        for row, ids in zip(batch.input_ids_BT[:, 0].tolist(), batch.input_ids_BT, strict=True):
            length = rows[row // 1000][1]
            assert ids[:length].tolist() == list(range(row, row + length))
            assert not ids[length:].any()
    marks = [slot * 1000 + position for slot, _, kept in rows for position in kept]
    expected = {
        mark: ([mark, mark + 1, -1], [-mark] * WIDTH, -mark, mark, mark, -2 * mark)
        for mark in marks
    }
    assert content(batches) == expected


@settings(max_examples=30, deadline=None)
@given(row_lists(), st.integers(1, 64), st.randoms())
def test_the_order_of_rows_changes_nothing(rows, max_tokens, random):
    plain = micro_batches(selected(rows), max_tokens)
    shuffled = list(rows)
    random.shuffle(shuffled)
    found = micro_batches(selected(shuffled), max_tokens)
    assert len(found) == len(plain)
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a.input_ids_BT, b.input_ids_BT)
        assert torch.equal(a.kept_rows_N, b.kept_rows_N)
        assert torch.equal(a.targets.ids_NK, b.targets.ids_NK)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 90), max_size=25), st.integers(1, 120))
def test_length_buckets(lengths, max_tokens):
    buckets = length_buckets(lengths, max_tokens)
    assert sorted(np.concatenate(buckets).tolist() if buckets else []) == list(range(len(lengths)))
    sizes = [[lengths[row] for row in bucket] for bucket in buckets]
    flat = [size for bucket in sizes for size in bucket]
    assert flat == sorted(flat, reverse=True)
    for bucket, after in zip(sizes, sizes[1:] + [[]] * bool(sizes), strict=True):
        assert bucket
        assert len(bucket) * max(bucket) <= max_tokens or len(bucket) == 1
        if after:  # filled as far as the budget goes
            assert (len(bucket) + 1) * max(bucket[0], 1) > max_tokens


def test_ties_in_length_keep_their_order():
    buckets = length_buckets([4, 9, 4, 4, 9], 20)
    assert [bucket.tolist() for bucket in buckets] == [[1, 4], [0, 2, 3]]
    with pytest.raises(SpecError):
        length_buckets([1], 0)


def test_a_slice_packs_only_its_rows():
    rows = [(0, 5, [1]), (1, 6, [2, 5]), (2, 4, [0]), (3, 9, [8])]
    part = micro_batches(selected(rows).slice(1, 2), 100)
    assert sorted(content(part)) == [1002, 1005, 2000]


def test_read_only_buffers_are_copied():
    array = np.arange(4, dtype=np.int32)
    array.flags.writeable = False
    tensor = to_tensor(array, torch.int64)
    tensor += 1
    assert array.tolist() == [0, 1, 2, 3]
    buffer = pa.py_buffer(np.arange(4, dtype=np.float32).tobytes())
    from_arrow = np.frombuffer(buffer, np.float32)
    to_tensor(from_arrow).zero_()
    assert from_arrow.tolist() == [0, 1, 2, 3]


def test_pad_right():
    assert pad_right([np.array([3, 4]), np.array([5])]).tolist() == [[3, 4], [5, 0]]
    assert pad_right([np.array([], np.int32)]).tolist() == [[0]]


def hidden_selected(rows, width=4):
    """As `selected`, with a hidden state of bfloat16 numbers that tell where they are from."""
    table = selected(rows)
    mark_N = column(table, "sampled_ids")
    bits_ND = torch.from_numpy(mark_N % 256 + np.arange(width)[:, None]).T.bfloat16()
    schema = selected_schema(width, "hidden")
    columns = {name: table.column(name) for name in schema.names if name in table.column_names}
    columns["teacher_hidden"] = list_array(
        bits_ND.contiguous().view(torch.uint16).numpy(),
        offsets(table, "sampled_ids"),
        schema.field("teacher_hidden").type,
    )
    return build(schema, columns)


def tensors_of(batch):
    """Every tensor by name, those of the targets too."""
    everything = vars(batch) | vars(batch.targets)
    return {name: one for name, one in everything.items() if isinstance(one, torch.Tensor)}


@pytest.mark.parametrize("targets", ["topk", "hidden"])
def test_an_empty_micro_batch_keeps_nothing(targets):
    made = selected if targets == "topk" else hidden_selected
    batch = empty_micro_batch(WIDTH, targets)
    assert batch.input_ids_BT.tolist() == [[0]]
    assert batch.tokens == 0
    assert not len(batch.kept_rows_N)
    real = micro_batches(made([(0, 3, [1])]), 8)[0]
    assert tensors_of(batch).keys() == tensors_of(real).keys()
    for name, value in tensors_of(real).items():
        own = tensors_of(batch)[name]
        assert own.dtype == value.dtype
        assert own.ndim == value.ndim
        assert name == "input_ids_BT" or own.shape[0] == 0


@pytest.mark.parametrize(("made", "count"), [(selected, 8), (hidden_selected, 6)])
def test_to_moves_every_tensor(made, count):
    moved = micro_batches(made([(0, 3, [1])]), 8)[0].to("meta")
    assert len(tensors_of(moved)) == count
    assert all(tensor.device.type == "meta" for tensor in tensors_of(moved).values())
    assert moved.tokens == 3


def test_a_micro_batch_is_packed_when_it_is_asked_for():
    batches = micro_batches(selected([(0, 5, [1]), (1, 4, [2])]), 5)
    assert len(batches) == 2
    assert batches[1] is not batches[1]
    assert [batch.tokens for batch in batches] == [batches[0].tokens, batches[1].tokens] == [5, 4]


def test_hidden_states_travel_bit_for_bit_with_their_token():
    table = hidden_selected([(0, 5, [1, 3]), (1, 6, [2, 5]), (2, 4, [0])]).slice(1)
    batches = micro_batches(table, 6)
    assert len(batches) == 2
    for batch in batches:
        assert batch.targets.hidden_NE.dtype == torch.bfloat16
        expected = batch.sampled_ids_N[:, None] % 256 + torch.arange(4)
        assert torch.equal(batch.targets.hidden_NE, expected.bfloat16())
    assert {row[0].item() for batch in batches for row in batch.targets.hidden_NE} == {
        float(mark % 256) for mark in (1002, 1005, 2000)
    }


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(TableError, match=r"kept_positions.*3 in row 1 of 3"):
        micro_batches(selected([(0, 5, [4]), (1, 3, [3])]), 8)
    table = selected([(0, 5, [4])])
    with pytest.raises(TableError, match="support_ids"):
        micro_batches(table.drop_columns(["support_ids"]), 8)
    with pytest.raises(TableError, match="kept_weight"):
        micro_batches(table.drop_columns(["kept_weight"]), 8)
    fewer = list_array(np.zeros(0, np.int32), [0, 0], table.schema.field("kept_positions").type)
    index = table.column_names.index("kept_positions")
    with pytest.raises(TableError, match="kept_positions"):
        micro_batches(table.set_column(index, table.schema.field(index), fewer), 8)


@pytest.mark.parametrize(
    "name",
    [one for one in selected_schema(WIDTH).names[6:-1] if one != "kept_weight"],
)
def test_columns_of_kept_tokens_must_agree_row_by_row(name):
    """The sum agrees: only the rows tell that a token has another one's targets."""
    table = selected([(0, 5, [2, 4]), (1, 6, [1, 3])])
    values = table.column(name).to_pylist()
    values[0].append(values[1].pop(0))
    field = table.schema.field(name)
    moved = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
    with pytest.raises(TableError, match=rf"'{name}': not as many a row"):
        micro_batches(moved, 8)
