"""The text beside the ids of shown rollouts."""

from __future__ import annotations

import numpy as np

from tests.runs_made import made_samples
from tests.stages.toys import toy_tokenizer
from tip_ray.contract import tables
from tip_ray.contract.tables import SAMPLES, TOP_SHOWN
from tip_ray.control.samples import with_text

RESPONSES = [[7, 8, 7], [], [9], [8, 8, 7, 5]]


def test_each_id_has_its_own_text_in_slices_and_empty_rows_too() -> None:
    tokenizer = toy_tokenizer()
    rng = np.random.default_rng(0)
    top = [[rng.integers(-1, 12, TOP_SHOWN).tolist() for _ in ids] for ids in RESPONSES]
    made = made_samples(1, [["?"] * len(ids) for ids in RESPONSES]).select(SAMPLES.names)
    columns = {name: made.column(name) for name in SAMPLES.names}
    reverse = [row[::-1] for row in top]
    columns |= {"response_ids": RESPONSES, "student_top_ids": top, "teacher_top_ids": reverse}
    samples = tables.build(SAMPLES, columns)

    def text(token: int) -> str:
        return "" if token == -1 else tokenizer.decode([token])

    for rows in (samples, samples.slice(2), samples.slice(1, 1), samples.slice(0, 0)):
        shown = with_text(rows, tokenizer)
        for row in shown.to_pylist():
            assert row["text"] == [text(token) for token in row["response_ids"]]
            assert row["prompt_text"] == tokenizer.decode(row["prompt_ids"])
            for model in ("student", "teacher"):
                ids = row[f"{model}_top_ids"]
                assert row[f"{model}_top_text"] == [[text(one) for one in five] for five in ids]
        assert shown.select(SAMPLES.names).equals(rows)
        assert shown.num_rows == rows.num_rows
