"""Data errors between the stages: what no replica could work on, and why.

A data error is told apart from a machine error here, inside the actor, before a model sees the
row. A row of ROLLOUTS that no teacher replica could score is quarantined, not retried; what is
wrong further on is no prompt's fault, and fails the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tip_ray.contract import tables
from tip_ray.contract.errors import DataError, TableError
from tip_ray.contract.headers import Quarantined
from tip_ray.contract.tables import column, offsets

_PROMPT_COLUMNS = ("prompt_ids", "teacher_prompt_ids")
_SCORE_COLUMNS = ("student_entropy", "reverse_kl", "forward_kl", "teacher_entropy")
_ROUNDING_NATS = 1e-2  # of entropies and log-probabilities


def refusals(table: pa.Table, vocab_size: int, max_row_tokens: int | None = None) -> dict[int, str]:
    """Row -> why no replica could score it, for rows of a ROLLOUTS table; ascending.

    Args:
        max_row_tokens: of the teacher's prompt and the response; None: any number.

    Raises:
        TableError: a token column differs in length from response_ids.
    """
    check_lengths(table, offsets(table, "response_ids"), "response_ids")
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


def check_lengths(table: pa.Table, starts: npt.NDArray[np.int64], like: str) -> None:
    """Every list column of `table` but prompts has rows as long as `starts` says.

    Raises:
        TableError: one has not; names the column, the rollout, and `like`, which has.
    """
    for field in table.schema:
        if not pa.types.is_list(field.type) or field.name in _PROMPT_COLUMNS:
            continue
        own = offsets(table, field.name)
        if not np.array_equal(own, starts):
            row = int(np.argmax(np.diff(own) != np.diff(starts)))
            raise TableError(
                f"column {field.name!r}: lengths differ from {like}: {np.diff(own)[row]} in "
                f"{tables.keys(table)[row]} (step, slot, sample_index), not {np.diff(starts)[row]}"
            )


def check_scores(table: pa.Table) -> None:
    """That SCORES can be selected from.

    Raises:
        TableError: columns differ in length, or a mask is neither 0 nor 1.
        DataError: a loss token's number is NaN or infinite; names the first and its rollout.
    """
    starts = offsets(table, "loss_mask")
    check_lengths(table, starts, "loss_mask")
    mask_T = column(table, "loss_mask")
    if (mask_T > 1).any():
        row = rows_of(table, mask_T > 1, "loss_mask")[0]
        raise TableError(f"column 'loss_mask': found {mask_T.max()} in {tables.keys(table)[row]}")
    for name in _SCORE_COLUMNS:
        values_T = column(table, name)
        bad_T = (mask_T == 1) & ~np.isfinite(values_T)
        if bad_T.any():
            place, row = int(np.argmax(bad_T)), rows_of(table, bad_T, "loss_mask")[0]
            raise DataError(
                f"column {name!r}: found {values_T[place]} at position {place - starts[row]} of "
                f"{tables.keys(table)[row]} (step, slot, sample_index), expected a finite number"
            )


def _row_tokens(table: pa.Table, row: int) -> int:
    """Prompt and response, as the teacher reads them."""
    theirs, response = table.column("teacher_prompt_ids")[row], table.column("response_ids")[row]
    prompt = theirs if theirs.is_valid else table.column("prompt_ids")[row]
    return len(prompt.values) + len(response.values)


def _bad_tokens(table: pa.Table, vocab_size: int) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Reason and the tokens it holds for; the student's numbers count at loss tokens only."""
    outside = f"outside the vocabulary of {vocab_size}"
    mask_N = column(table, "loss_mask")
    loss_N = mask_N == 1
    yield "loss_mask is neither 0 nor 1", mask_N > 1
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
    for name in ("student_logprob", "student_topk_logprobs", "student_tail_logprob"):
        above = column(table, name) > _ROUNDING_NATS
        above_N = above if above.ndim == 1 else above.any(axis=1)
        yield f"{name} is above 0", loss_N & above_N
    entropy_N, most_nats = column(table, "student_entropy"), math.log(vocab_size)
    beyond_N = (entropy_N < -_ROUNDING_NATS) | (entropy_N > most_nats + _ROUNDING_NATS)
    yield f"student_entropy is not within 0 to {most_nats:.3f} nats", loss_N & beyond_N
    tail_N = column(table, "student_tail_logprob")  # -inf: nothing is outside the support
    yield "student_tail_logprob is not a number", loss_N & ~(tail_N < np.inf)


def _within(ids: npt.NDArray[np.int32], vocab_size: int) -> npt.NDArray[np.bool_]:
    return (ids >= 0) & (ids < vocab_size)


def rows_of(
    table: pa.Table, tokens_N: npt.NDArray[np.bool_], name: str = "response_ids"
) -> list[int]:
    """Rows with at least one of the marked tokens of column `name`, ascending."""
    starts = offsets(table, name)
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
