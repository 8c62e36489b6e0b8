"""`tip-ray`, with faults that cannot be brought in from outside: poison and non-finite numbers.

    python -m tests.faults.driver run SPEC ...

TIP_TEST_POISON      "STEP:SLOT,..."  prompts that no replica can process
TIP_TEST_NONFINITE   "STEP,..."       steps whose loss is not a number on rank 0
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pyarrow as pa

from tip_ray.cli import main
from tip_ray.contract import tables
from tip_ray.stages.learner import LearnerActor
from tip_ray.stages.prompts import PromptSource

POISON, NONFINITE = "TIP_TEST_POISON", "TIP_TEST_NONFINITE"
NO_TOKEN = 10**6


class LearnerWithBadSteps(LearnerActor):
    """Rank 0 is given weights that are not numbers, at steps of the environment's choice."""

    def _own_rows(self, step: int, selected: Any) -> pa.Table:
        table = super()._own_rows(step, selected)
        if self._rank or step not in _numbers(os.environ.get(NONFINITE, "")):
            return table
        weights = np.full(len(tables.column(table, "kept_weight")), np.nan, np.float32)
        kind = table.schema.field("kept_weight").type
        bad = tables.list_array(weights, tables.offsets(table, "kept_weight"), kind)
        place = table.schema.get_field_index("kept_weight")
        return table.set_column(place, table.schema.field(place), bad)


def poisoned(take: Any, places: set[tuple[int, int]]) -> Any:
    """PromptSource.take, with a token that the vocabulary does not have at (step, slot)."""

    def take_poisoned(self: PromptSource, step: int, count: int) -> pa.Table:
        table = take(self, step, count)
        slots = table.column("slot").to_pylist()
        rows = [
            [NO_TOKEN] if (step, slot) in places else ids
            for slot, ids in zip(slots, table.column("prompt_ids").to_pylist(), strict=True)
        ]
        place = table.schema.get_field_index("prompt_ids")
        field = table.schema.field(place)
        return table.set_column(place, field, pa.array(rows, field.type))

    return take_poisoned


def install() -> None:
    """Put the faults of the environment in place."""
    from tip_ray.control import crew

    if os.environ.get(NONFINITE):
        LearnerWithBadSteps.__name__ = LearnerActor.__name__  # as the process is called
        crew.LearnerActor = LearnerWithBadSteps
    if os.environ.get(POISON):
        places = [one.split(":") for one in os.environ[POISON].split(",")]
        wanted = {(int(step), int(slot)) for step, slot in places}
        PromptSource.take = poisoned(PromptSource.take, wanted)


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",") if one]


if __name__ == "__main__":
    install()
    sys.exit(main())
