"""SELECTED tables as token-budgeted micro-batches of right-padded rows.

B  rows of a micro-batch        T  its longest row        N  its kept tokens        K  support width
E  width of the teacher's hidden state

Attention is causal, so padding after a row never reaches its tokens: no attention mask is needed,
and kept rows are indices, never inferred from pad values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tip_ray.contract.errors import SpecError, TableError
from tip_ray.contract.tables import (
    Targets,
    column,
    conform,
    empty,
    keys,
    offsets,
    selected_schema,
    target_width,
)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SupportTargets:
    """The teacher on a support and its tail."""

    ids_NK: Tensor  # int64; -1 = padding
    logprobs_NK: Tensor  # float32, nats
    tail_N: Tensor  # float32, nats


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's final hidden states."""

    hidden_NE: Tensor  # bfloat16


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward reads."""

    input_ids_BT: Tensor  # int64; 0 after a row's end
    kept_rows_N: Tensor  # int64; b * T + position of the input whose logits predict the kept token
    targets: SupportTargets | HiddenTargets
    weight_N: Tensor  # float32; normalisation included
    sampled_ids_N: Tensor  # int64; the kept token itself
    student_logprob_N: Tensor  # float32, nats; recorded at rollout
    tokens: int  # input tokens without padding

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on `device`."""
        targets = replace(self.targets, **_moved(self.targets, device))
        return replace(self, targets=targets, **_moved(self, device))


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batches of a step; each is packed when it is asked for, since targets are large."""

    table: pa.Table
    buckets: Sequence[Ints]  # rows of the table

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, index: int) -> MicroBatch:
        return _micro_batch(self.table, self.buckets[index])

    def __iter__(self) -> Iterator[MicroBatch]:
        return (self[index] for index in range(len(self)))


def micro_batches(selected: pa.Table, max_tokens: int) -> MicroBatches:
    """`selected` (of `selected_schema`) as micro-batches of at most `max_tokens` padded tokens.

    Rows are bucketed by (length, key), longest first, whatever their order in the table; a longer
    row travels alone, and one without kept tokens not at all.

    Raises:
        SpecError: `max_tokens` is below 1.
        TableError: `selected` does not conform, a row's columns of kept tokens differ in length,
            or a kept position is outside of its row.
    """
    table = conform(selected, selected_schema(*target_width(selected)))
    lengths_R, kept_R = np.diff(offsets(table, "input_ids")), np.diff(offsets(table, "kept_weight"))
    _check_positions(table, lengths_R, kept_R)
    key_of = keys(table)
    by_key = sorted(np.flatnonzero(kept_R).tolist(), key=lambda row: key_of[row])
    rows_by_key = np.asarray(by_key, np.int64)
    buckets = length_buckets(lengths_R[rows_by_key], max_tokens)
    return MicroBatches(table, [rows_by_key[bucket] for bucket in buckets])


def empty_micro_batch(width: int, targets: Targets = "topk") -> MicroBatch:
    """One token, none kept: what a rank without work runs so that all ranks run equally often."""
    return MicroBatch(
        input_ids_BT=torch.zeros(1, 1, dtype=torch.int64),
        kept_rows_N=torch.zeros(0, dtype=torch.int64),
        targets=_targets(empty(selected_schema(width, targets))),
        weight_N=torch.zeros(0),
        sampled_ids_N=torch.zeros(0, dtype=torch.int64),
        student_logprob_N=torch.zeros(0),
        tokens=0,
    )


def length_buckets(lengths: Sequence[int] | npt.NDArray[Any], max_tokens: int) -> list[Ints]:
    """Row indices in buckets of at most `max_tokens` padded tokens (rows x longest).

    Longest first, ties in order of the index; a row longer than `max_tokens` is alone.

    Raises:
        SpecError: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise SpecError("max_tokens", str(max_tokens), "at least 1")
    lengths_R = np.asarray(lengths, np.int64)
    order_R = np.argsort(-lengths_R, kind="stable")
    buckets, start = [], 0
    while start < len(order_R):
        longest = max(int(lengths_R[order_R[start]]), 1)
        end = start + max(max_tokens // longest, 1)
        buckets.append(order_R[start:end])
        start = end
    return buckets


def to_tensor(array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that owns its memory: arrays out of Ray's store are read-only, torch may write."""
    return torch.tensor(array, dtype=dtype)


def pad_right(rows: Sequence[npt.NDArray[Any]]) -> Tensor:
    """int64 [B, T] of rows of token ids, 0 after their end; T is at least 1."""
    longest = max((len(row) for row in rows), default=0)
    padded = torch.zeros(len(rows), max(longest, 1), dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = to_tensor(row)
    return padded


def _micro_batch(table: pa.Table, rows: Ints) -> MicroBatch:
    part = table.take(pa.array(rows)).combine_chunks()
    ends = offsets(part, "input_ids")
    input_ids = column(part, "input_ids")
    input_ids_BT = pad_right([input_ids[a:b] for a, b in pairwise(ends)])
    row_N = np.repeat(np.arange(len(rows)), np.diff(offsets(part, "kept_positions")))
    kept_rows_N = row_N * input_ids_BT.shape[1] + column(part, "kept_positions")
    return MicroBatch(
        input_ids_BT=input_ids_BT,
        kept_rows_N=to_tensor(kept_rows_N, torch.int64),
        targets=_targets(part),
        weight_N=to_tensor(column(part, "kept_weight")),
        sampled_ids_N=to_tensor(column(part, "sampled_ids"), torch.int64),
        student_logprob_N=to_tensor(column(part, "student_logprob")),
        tokens=len(input_ids),
    )


def _targets(part: pa.Table) -> SupportTargets | HiddenTargets:
    if "teacher_hidden" in part.column_names:
        bits_NE = to_tensor(column(part, "teacher_hidden"))
        return HiddenTargets(bits_NE.view(torch.bfloat16))
    return SupportTargets(
        ids_NK=to_tensor(column(part, "support_ids"), torch.int64),
        logprobs_NK=to_tensor(column(part, "teacher_logprobs")),
        tail_N=to_tensor(column(part, "teacher_tail_logprob")),
    )


def _moved(of: MicroBatch | SupportTargets | HiddenTargets, device: Any) -> dict[str, Any]:
    tensors = {name: one for name, one in vars(of).items() if isinstance(one, Tensor)}
    return {name: one.to(device, non_blocking=True) for name, one in tensors.items()}


def _check_positions(table: pa.Table, lengths_R: Ints, kept_R: Ints) -> None:
    lists = [field.name for field in table.schema if pa.types.is_list(field.type)]
    for name in lists:
        if name != "input_ids" and (np.diff(offsets(table, name)) != kept_R).any():
            raise TableError(f"column {name!r}: not as many a row as in 'kept_weight'")
    positions_N = column(table, "kept_positions")
    outside_N = (positions_N < 0) | (positions_N >= np.repeat(lengths_R, kept_R))
    if outside_N.any():
        row = int(np.repeat(np.arange(len(kept_R)), kept_R)[np.argmax(outside_N)])
        found = int(positions_N[np.argmax(outside_N)])
        raise TableError(
            f"column 'kept_positions': {found} in row {row} of {lengths_R[row]} input_ids"
        )
