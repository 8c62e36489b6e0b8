"""TARGETS + KEEP -> SELECTED: what the learner uses, and nothing else, leaves the teacher's node.

A pure function that runs as a task where TARGETS lie. What it returns is copied out, since a
slice would pin the whole table it was cut from.

k  kept tokens        W  width of the target support        m  response tokens of a row
D  width of the teacher's hidden state
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tip_ray.contract import tables
from tip_ray.contract.errors import TableError
from tip_ray.contract.headers import CutHeader
from tip_ray.contract.tables import TOP_SHOWN
from tip_ray.stages.data_errors import check_lengths, rows_of

_KEY = ("step", "slot", "sample_index")
IntArray = npt.NDArray[np.int64]


def cut(
    ranks: Sequence[int],
    keep: pa.Table,
    scores: pa.Table,
    targets: pa.Table,
    *rollouts: pa.Table,
    sampled_only: bool = False,
) -> tuple[Any, ...]:
    """(CutHeader, SAMPLES, SELECTED of the first rank, SELECTED of the second, ...).

    Args:
        ranks: learner ranks that get a table. A batch has a few rows, and so something for a few of
            many ranks.
        keep: KEEP of the whole step; rows of other batches are ignored.
        scores, targets: one teacher batch; of the targets' kind is what travels.
        rollouts: ROLLOUTS tables that hold at least the rows of the batch.
        sampled_only: the support that travels is the sampled token alone, for policy_gradient.

    Raises:
        TableError: a rollout that KEEP decided on is missing, or the tables disagree on its length.
    """
    began = time.perf_counter()
    width, kind = (1, "topk") if sampled_only else tables.target_width(targets)
    schema = tables.selected_schema(width, kind)
    batch = _aligned(keep, scores, targets, rollouts)
    selected = [_select(batch, rank, schema, sampled_only) for rank in ranks]
    sent = [tables.nbytes(table) for table in selected]
    header = CutHeader(
        selected_bytes=tuple(sent),
        unpruned_bytes=sum(sent) + _left_out_bytes(batch, selected, schema),
        busy_s=time.perf_counter() - began,
    )
    return (header, _samples(batch), *selected)


class _Batch:
    """The batch's rows of all four tables, in one order."""

    def __init__(
        self, keep: pa.Table, scores: pa.Table, targets: pa.Table, rollouts: pa.Table
    ) -> None:
        self.keep, self.scores, self.targets, self.rollouts = keep, scores, targets, rollouts
        self.response_offsets = tables.offsets(rollouts, "response_ids")
        self.prompt_offsets = tables.offsets(rollouts, "prompt_ids")
        self.kept_offsets = tables.offsets(keep, "kept")
        self._check()

    def _check(self) -> None:
        """Flat indices are made of offsets: where tables disagree they are of another token."""
        for table in (self.scores, self.targets, self.keep.select([*_KEY, "quadrant"])):
            check_lengths(table, self.response_offsets, "response_ids of ROLLOUTS")
        check_lengths(self.keep.select([*_KEY, "kept", "weight"]), self.kept_offsets, "kept")
        check_lengths(self.rollouts, self.response_offsets, "response_ids")
        kept, counts = tables.column(self.keep, "kept"), np.diff(self.kept_offsets)
        outside = (kept < 0) | (kept >= np.repeat(np.diff(self.response_offsets), counts))
        if outside.any():
            key = tables.keys(self.keep)[int(rows_of(self.keep, outside, "kept")[0])]
            raise TableError(f"column 'kept': {kept[outside][0]} is no response token of {key}")

    def flat(self, rows: IntArray) -> IntArray:
        """[k] indices into the flat response columns of the tokens kept in `rows`."""
        kept = tables.column(self.keep, "kept")
        parts = [
            self.response_offsets[row] + kept[self.kept_offsets[row] : self.kept_offsets[row + 1]]
            for row in rows
        ]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def _aligned(
    keep: pa.Table, scores: pa.Table, targets: pa.Table, rollouts: tuple[pa.Table, ...]
) -> _Batch:
    """Rows that KEEP decided on, in the order of the teacher's batch."""
    made = pa.concat_tables(rollouts)
    place = {key: row for row, key in enumerate(tables.keys(made))}
    decided = {key: row for row, key in enumerate(tables.keys(keep))}
    own = tables.keys(targets)
    rows = [row for row, key in enumerate(own) if key in decided]
    missing = [own[row] for row in rows if own[row] not in place]
    if missing or tables.keys(scores) != own:
        what = f"no rollout of {missing[0]}" if missing else "SCORES of other rollouts than TARGETS"
        raise TableError(f"cut: {what}; all tables of a teacher batch belong together")
    if len(rows) < len(own):  # rarely: the heavy half is not copied without need
        scores, targets = scores.take(rows), targets.take(rows)
    return _Batch(
        keep.take([decided[own[row]] for row in rows]).combine_chunks(),
        scores.combine_chunks(),
        targets.combine_chunks(),
        made.take([place[own[row]] for row in rows]).combine_chunks(),
    )


def _select(batch: _Batch, rank: int, schema: pa.Schema, sampled_only: bool) -> pa.Table:
    """SELECTED of one rank."""
    rows = np.flatnonzero(tables.column(batch.keep, "rank") == rank)
    flat_k = batch.flat(rows)
    kept_counts = np.diff(batch.kept_offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(kept_counts)])
    inputs, input_offsets, prompt_lengths = _inputs(batch, rows)
    kept = _rows_of(batch.keep, "kept", rows)
    positions = kept + np.repeat(prompt_lengths, kept_counts) - 1
    columns: dict[str, Any] = {
        name: batch.rollouts.column(name).take(rows)
        for name in (*tables.KEY_COLUMNS, "weight_version")
    }
    columns["input_ids"] = tables.list_array(inputs, input_offsets, schema.field("input_ids").type)
    flat_columns = {
        "kept_positions": positions.astype(np.int32),
        "kept_weight": _rows_of(batch.keep, "weight", rows),
        "sampled_ids": tables.column(batch.rollouts, "response_ids")[flat_k],
        "student_logprob": tables.column(batch.rollouts, "student_logprob")[flat_k],
        **(_sampled_support if sampled_only else _kept_targets)(batch, flat_k),
    }
    for name, values in flat_columns.items():
        columns[name] = tables.list_array(values, offsets, schema.field(name).type)
    return tables.build(schema, columns)


def _kept_targets(batch: _Batch, flat_k: IntArray) -> dict[str, npt.NDArray[Any]]:
    names = ("support_ids", "teacher_logprobs", "teacher_tail_logprob", "teacher_hidden")
    there = [name for name in names if name in batch.targets.column_names]
    return {name: tables.column(batch.targets, name)[flat_k] for name in there}


def _sampled_support(batch: _Batch, flat_k: IntArray) -> dict[str, npt.NDArray[Any]]:
    """The sampled token as a support of width 1."""
    logprob_k = tables.column(batch.targets, "teacher_sampled_logprob")[flat_k]
    with np.errstate(divide="ignore"):  # a teacher that is sure leaves a tail of -inf
        tail_k = np.log1p(-np.exp(np.minimum(logprob_k, 0.0), dtype=np.float64))
    return {
        "support_ids": tables.column(batch.rollouts, "response_ids")[flat_k, None],
        "teacher_logprobs": logprob_k[:, None],
        "teacher_tail_logprob": tail_k.astype(np.float32),
    }


def _inputs(batch: _Batch, rows: IntArray) -> tuple[npt.NDArray[np.int32], IntArray, IntArray]:
    """Flat input ids of `rows`, their offsets, and the rows' prompt lengths.

    The logits that predict response token t are those at input prompt + t - 1, so the last
    input that is needed is the one before the last kept token.
    """
    prompts = tables.column(batch.rollouts, "prompt_ids")
    responses = tables.column(batch.rollouts, "response_ids")
    kept = tables.column(batch.keep, "kept")
    parts: list[npt.NDArray[np.int32]] = []
    for row in rows:
        begin = batch.response_offsets[row]
        last_kept = kept[batch.kept_offsets[row + 1] - 1]
        parts += [
            prompts[batch.prompt_offsets[row] : batch.prompt_offsets[row + 1]],
            responses[begin : begin + last_kept],
        ]
    lengths = [len(parts[i]) + len(parts[i + 1]) for i in range(0, len(parts), 2)]
    flat = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return flat, offsets, np.diff(batch.prompt_offsets)[rows]


def _rows_of(table: pa.Table, name: str, rows: IntArray) -> npt.NDArray[Any]:
    """Flat values of a list column, of some rows only."""
    return tables.column(table.select([name]).take(rows), name)


def _left_out_bytes(batch: _Batch, selected: list[pa.Table], schema: pa.Schema) -> int:
    """What keeping every loss token would have added to the tables of all ranks."""
    token_bytes = sum(_bytes_a_token(field.type) for field in schema if field.name != "input_ids")
    loss_tokens = int((tables.column(batch.scores, "loss_mask") != 0).sum())
    kept_tokens = sum(len(tables.column(table, "kept_positions")) for table in selected)
    all_inputs = int(
        batch.prompt_offsets[-1] + batch.response_offsets[-1] - batch.rollouts.num_rows
    )
    inputs = sum(len(tables.column(table, "input_ids")) for table in selected)
    return token_bytes * (loss_tokens - kept_tokens) + 4 * max(all_inputs - inputs, 0)


def _bytes_a_token(kind: pa.DataType) -> int:
    """Bytes a token of a list column; 0 for a column with one value a row."""
    if not pa.types.is_list(kind):
        return 0
    item = kind.value_type
    if pa.types.is_fixed_size_list(item):
        return int(item.list_size * item.value_type.bit_width // 8)
    return int(item.bit_width // 8)


def _samples(batch: _Batch) -> pa.Table:
    """SAMPLES: the rows marked to be shown, whole."""
    rows = np.flatnonzero(tables.column(batch.keep, "shown"))
    rollouts, scores = batch.rollouts.take(rows), batch.scores.take(rows)
    shown = ("teacher_sampled_logprob", "teacher_top_ids", "teacher_top_logprobs")
    targets, keep = batch.targets.select(shown).take(rows), batch.keep.take(rows)
    offsets = tables.offsets(rollouts, "response_ids")
    kept_flags = np.zeros(int(offsets[-1]), np.uint8)
    kept_offsets, kept = tables.offsets(keep, "kept"), tables.column(keep, "kept")
    for row in range(len(rows)):
        kept_flags[offsets[row] + kept[kept_offsets[row] : kept_offsets[row + 1]]] = 1
    columns: dict[str, Any] = {
        name: source.column(name)
        for source, names in (
            (rollouts, (*tables.KEY_COLUMNS, "prompt_ids", "response_ids", "loss_mask")),
            (rollouts, ("student_logprob", "weight_version", "finish_reason")),
            (scores, ("student_entropy", "teacher_entropy", "reverse_kl", "forward_kl")),
            (targets, ("teacher_top_ids", "teacher_top_logprobs")),
            (keep, ("quadrant",)),
        )
        for name in names
    }
    columns["teacher_logprob"] = targets.column("teacher_sampled_logprob")
    for ours, theirs in (
        ("kept", kept_flags),
        ("student_top_ids", _first(rollouts, "student_topk_ids", -1)),
        ("student_top_logprobs", _first(rollouts, "student_topk_logprobs", -np.inf)),
    ):
        columns[ours] = tables.list_array(theirs, offsets, tables.SAMPLES.field(ours).type)
    return tables.build(tables.SAMPLES, columns)


def _first(table: pa.Table, name: str, fill: float) -> npt.NDArray[Any]:
    """[T, TOP_SHOWN]: the first of K columns, filled up where K is smaller."""
    values = tables.column(table, name)
    if not len(values):
        return np.zeros((0, TOP_SHOWN), values.dtype)
    shown = np.full((len(values), TOP_SHOWN), fill, values.dtype)
    width = min(TOP_SHOWN, values.shape[1])
    shown[:, :width] = values[:, :width]
    return shown
