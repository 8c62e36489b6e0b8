"""The cut where targets are heavy: what travels, and what it weighs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.tables_made import keep_of, made_step
from tip_ray.contract import tables
from tip_ray.stages.cut import cut

RESPONSE = 100


@pytest.mark.parametrize(
    ("targets", "width", "half", "tenth"),
    [("hidden", 4096, 0.505, 0.105), ("topk", 64, 0.52, 0.13)],
)
def test_bytes_to_the_learner_follow_the_kept_tokens(
    targets: tables.Targets, width: int, half: float, tenth: float
) -> None:
    """At the widths of large models, and a prompt of a quarter of the response."""
    made = made_step(
        np.random.default_rng(0),
        rows=1,
        masked=False,
        width=width,
        vocab_size=90,
        targets=targets,
        lengths=(RESPONSE // 4, RESPONSE),
    )
    key, sent = tables.keys(made.rollouts)[0], {}
    for count in (RESPONSE, RESPONSE // 2, RESPONSE // 10):
        earlier = np.random.default_rng(1).choice(RESPONSE - 1, count - 1, replace=False)
        positions = [*sorted(earlier.tolist()), RESPONSE - 1]  # the row is read to its end, as ever
        header, _, selected = cut(
            [0], keep_of(made.rollouts, {key: positions}), made.scores, made.targets, made.rollouts
        )
        name = "teacher_hidden" if targets == "hidden" else "teacher_logprobs"
        assert tables.column(selected, name).shape == (len(positions), width)
        whole = tables.column(made.targets, name)
        assert (tables.column(selected, name) == whole[positions]).all()
        assert selected.get_total_buffer_size() < 1.02 * header.selected_bytes[0]  # pins no more
        sent[count] = header.selected_bytes[0]
        assert header.unpruned_bytes == pytest.approx(sent[RESPONSE], rel=0.01)
    assert sent[RESPONSE // 2] / sent[RESPONSE] <= half
    assert sent[RESPONSE // 10] / sent[RESPONSE] <= tenth


@pytest.mark.parametrize("targets", ["topk", "hidden"])
def test_rows_that_nobody_decided_on_are_left_out(targets: tables.Targets) -> None:
    made = made_step(np.random.default_rng(2), rows=9, targets=targets)
    keys = tables.keys(made.rollouts)
    kept = {key: [0] for key in keys}
    _, _, *whole = cut(
        range(2), keep_of(made.rollouts, kept, 2), made.scores, made.targets, made.rollouts
    )
    some = {key: [0] for row, key in enumerate(keys) if row % 4 in (0, 1)}
    _, _, *fewer = cut(
        range(2), keep_of(made.rollouts, some, 1), made.scores, made.targets, made.rollouts
    )
    assert fewer[1].num_rows == 0
    expected = {key: row for part in whole for key, row in keyed(part).items()}
    assert keyed(fewer[0]) == {key: expected[key] for key in some}


def test_only_ranks_that_are_asked_for_get_a_table() -> None:
    made = made_step(np.random.default_rng(3), rows=9)
    keep = keep_of(made.rollouts, {key: [0] for key in tables.keys(made.rollouts)}, 3)
    header, samples, *whole = cut(range(3), keep, made.scores, made.targets, made.rollouts)
    some, same, *asked = cut([2, 0], keep, made.scores, made.targets, made.rollouts)
    assert same.equals(samples)
    assert [table.num_rows for table in asked] == [3, 3]
    assert asked[0].equals(whole[2])
    assert asked[1].equals(whole[0])
    assert some.selected_bytes == (header.selected_bytes[2], header.selected_bytes[0])


def keyed(table: pa.Table) -> dict[tables.Key, dict[str, Any]]:
    return dict(zip(tables.keys(table), table.to_pylist(), strict=True))
