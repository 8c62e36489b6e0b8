from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tip_ray.compute.row_blocks import row_blocks


@given(st.lists(st.integers(0, 6), max_size=12))
def test_blocks_are_the_rows_by_length(lengths):
    offsets = np.cumsum([0, *lengths])
    rows = [list(range(a, b)) for a, b in pairwise(offsets)]
    found = [block.tolist() for block in row_blocks(offsets)]
    by_length = [[row for row in rows if len(row) == m] for m in sorted({*lengths} - {0})]
    assert found == by_length
