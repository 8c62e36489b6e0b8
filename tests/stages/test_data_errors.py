"""What no replica could work on: found row by row, in one line that names the rollout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.tables_made import MadeStep, made_step
from tip_ray.contract import tables
from tip_ray.contract.errors import DataError, TableError
from tip_ray.stages.data_errors import check_lengths, check_scores, refusals

VOCAB = 50


@pytest.fixture
def made() -> MadeStep:
    return made_step(np.random.default_rng(0), vocab_size=VOCAB, masked=False)


def with_value(table: pa.Table, name: str, row: int, position: int, value: Any) -> pa.Table:
    """`table` with one token's value replaced."""
    values = table.column(name).to_pylist()
    values[row][position] = value
    field = table.schema.field(name)
    return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))


def shifted(table: pa.Table, name: str) -> pa.Table:
    """`table` with one token of column `name` moved from the second row to the first."""
    values = table.column(name).to_pylist()
    values[0].append(values[1].pop())
    field = table.schema.field(name)
    return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))


def plausible(made: MadeStep) -> pa.Table:
    """Rollouts whose log-probabilities are at most 0."""
    table = made.rollouts
    for name in ("student_logprob", "student_tail_logprob"):
        values = [[-abs(one) for one in row] for row in table.column(name).to_pylist()]
        field = table.schema.field(name)
        place = table.column_names.index(name)
        table = table.set_column(place, field, pa.array(values, field.type))
    return table


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("loss_mask", 2, "loss_mask is neither 0 nor 1"),
        ("student_logprob", 0.1, "student_logprob is above 0"),
        ("student_logprob", math.nan, "student_logprob is not finite"),
        ("student_logprob", -math.inf, "student_logprob is not finite"),
        ("student_topk_logprobs", [0.5, -1.0, -2.0, -3.0], "student_topk_logprobs is above 0"),
        ("student_tail_logprob", 0.1, "student_tail_logprob is above 0"),
        ("student_tail_logprob", math.nan, "student_tail_logprob is not a number"),
        ("student_entropy", -0.1, "student_entropy is not within 0 to 3.912 nats"),
        ("student_entropy", 4.0, "student_entropy is not within 0 to 3.912 nats"),
        ("student_entropy", math.inf, "student_entropy is not finite"),
        ("student_topk_ids", [1, 2, 3, VOCAB], "student_topk_ids with an id outside"),
        ("student_topk_ids", [1, 2, 3, 1], "student_topk_ids with an id twice"),
    ],
)
def test_a_rollout_that_makes_no_sense_is_refused_alone(
    made: MadeStep, name: str, value: Any, reason: str
) -> None:
    table = plausible(made)
    assert refusals(table, VOCAB) == {}
    found = refusals(with_value(table, name, 3, 0, value), VOCAB)
    assert list(found) == [3]
    assert reason in found[3]
    if name != "loss_mask":  # where no loss is taken, such numbers are not read
        unread = with_value(with_value(table, name, 3, 0, value), "loss_mask", 3, 0, 0)
        assert refusals(unread, VOCAB) == {}


def test_rounding_is_no_error(made: MadeStep) -> None:
    table = with_value(plausible(made), "student_entropy", 0, 0, math.log(VOCAB) + 1e-4)
    table = with_value(table, "student_entropy", 1, 0, -1e-6)
    table = with_value(table, "student_logprob", 2, 0, 1e-6)
    table = with_value(table, "student_tail_logprob", 2, 0, -math.inf)
    assert refusals(table, VOCAB) == {}


def test_lengths_that_differ_in_a_row_are_found_where_the_sum_agrees(made: MadeStep) -> None:
    starts = tables.offsets(made.scores, "loss_mask")
    for table, name in ((made.scores, "reverse_kl"), (made.targets, "support_ids")):
        check_lengths(table, starts, "loss_mask")
        with pytest.raises(TableError, match=rf"'{name}': lengths differ.*\(1, 0, 0\)"):
            check_lengths(shifted(table, name), starts, "loss_mask")


@pytest.mark.parametrize("name", ["student_entropy", "reverse_kl", "forward_kl", "teacher_entropy"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_name_the_rollout(made: MadeStep, name: str, bad: float) -> None:
    check_scores(made.scores)
    spoilt = with_value(made.scores, name, 3, 0, bad)
    with pytest.raises(DataError, match=rf"'{name}': found {bad} at position 0 of \(1, 1, 1\)"):
        check_scores(spoilt)
    check_scores(with_value(spoilt, "loss_mask", 3, 0, 0))


def test_scores_of_other_lengths_or_masks_are_refused(made: MadeStep) -> None:
    with pytest.raises(TableError, match="'forward_kl': lengths differ from loss_mask"):
        check_scores(shifted(made.scores, "forward_kl"))
    with pytest.raises(TableError, match=r"'loss_mask': found 7 in \(1, 0, 1\)"):
        check_scores(with_value(made.scores, "loss_mask", 1, 0, 7))
    check_scores(tables.empty(tables.SCORES))
