"""Data errors of ROLLOUTS: rows that no teacher replica could score, and why.

A data error is told apart from a machine error here, inside the actor, before a model sees the
row: it is quarantined, not retried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tip_ray.contract import tables
from tip_ray.contract.errors import TableError
from tip_ray.contract.headers import Quarantined
from tip_ray.contract.tables import column, offsets

_TOKEN_COLUMNS = ("loss_mask", "student_logprob", "student_entropy", "student_tail_logprob",
                  "student_topk_ids", "student_topk_logprobs")  # fmt: skip


def refusals(table: pa.Table, vocab_size: int, max_row_tokens: int | None = None) -> dict[int, str]:
    """Row -> why no replica could score it, for rows of a ROLLOUTS table; ascending.

    Args:
        max_row_tokens: of the teacher's prompt and the response; None: any number.

    Raises:
        TableError: a token column differs in length from response_ids.
    """
    starts = offsets(table, "response_ids")
    for name in _TOKEN_COLUMNS:
        if not np.array_equal(offsets(table, name), starts):
            raise TableError(f"column {name!r}: lengths differ from response_ids in some row")
    reasons: dict[int, str] = {}
    for row in range(table.num_rows):
        for name in ("prompt_ids", "teacher_prompt_ids"):
            ids = table.column(name)[row]
            if ids.is_valid and not _within(ids.values.to_numpy(), vocab_size).all():
                reasons[row] = f"{name} with an id outside the vocabulary of {vocab_size}"
            if ids.is_valid and len(ids.values) == 0:
                reasons[row] = f"{name} is empty: nothing predicts the first response token"
        tokens = _row_tokens(table, row)
        if max_row_tokens is not None and tokens > max_row_tokens:
            reasons[row] = f"{tokens} tokens for the teacher to read, at most {max_row_tokens}"
    for reason, bad_N in _bad_tokens(table, vocab_size):
        for row in rows_of(table, bad_N):
            reasons.setdefault(row, reason)
    return dict(sorted(reasons.items()))


def _row_tokens(table: pa.Table, row: int) -> int:
    """Prompt and response, as the teacher reads them."""
    theirs, response = table.column("teacher_prompt_ids")[row], table.column("response_ids")[row]
    prompt = theirs if theirs.is_valid else table.column("prompt_ids")[row]
    return len(prompt.values) + len(response.values)


def _bad_tokens(table: pa.Table, vocab_size: int) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Reason and the tokens it holds for; the student's numbers count at loss tokens only."""
    outside = f"outside the vocabulary of {vocab_size}"
    loss_N = column(table, "loss_mask") == 1
    yield f"response_ids with an id {outside}", ~_within(column(table, "response_ids"), vocab_size)
    ids_NK = column(table, "student_topk_ids")
    yield (
        f"student_topk_ids with an id {outside}",
        loss_N & ~_within(ids_NK, vocab_size).all(axis=1),
    )
    twice_N = (np.diff(np.sort(ids_NK, axis=1), axis=1) == 0).any(axis=1)
    yield "student_topk_ids with an id twice", loss_N & twice_N
    for name in ("student_logprob", "student_entropy", "student_topk_logprobs"):
        finite = np.isfinite(column(table, name))
        finite_N = finite if finite.ndim == 1 else finite.all(axis=1)
        yield f"{name} is not finite", loss_N & ~finite_N
    tail_N = column(table, "student_tail_logprob")  # -inf: nothing is outside the support
    yield "student_tail_logprob is not a number", loss_N & ~(tail_N < np.inf)


def _within(ids: npt.NDArray[np.int32], vocab_size: int) -> npt.NDArray[np.bool_]:
    return (ids >= 0) & (ids < vocab_size)


def rows_of(table: pa.Table, tokens_N: npt.NDArray[np.bool_]) -> list[int]:
    """Rows with at least one of the marked tokens, ascending."""
    starts = offsets(table, "response_ids")
    rows = np.searchsorted(starts, np.flatnonzero(tokens_N), side="right") - 1
    return [int(row) for row in np.unique(rows)]


def quarantine(table: pa.Table, row: int, reason: str) -> Quarantined:
    """Row `row` of `table`, named for the driver."""
    one = table.slice(row, 1)
    return Quarantined(tables.keys(one)[0], one.column("prompt_uid")[0].as_py(), "teacher", reason)


def without_rows(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """`table` without some rows, the others copied out."""
    if not rows:
        return table
    keep = np.setdiff1d(np.arange(table.num_rows), np.asarray(rows, np.int64))
    return table.take(pa.array(keep)).combine_chunks()
