"""Rollouts of equal length as one two-dimensional block: array arithmetic, not a loop over rows.

N  loss tokens of the step, rollout by rollout
B  rollouts of one length        m  that length

Fewer than sqrt(2 N) lengths can differ, so a step of very unequal rollouts has few blocks too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tip_ray.compute.columns import Ints


def row_blocks(row_offsets: Ints) -> Iterator[Ints]:
    """[B, m] for each length m above 0, shortest first: where the tokens of its rollouts lie."""
    lengths_R = np.diff(row_offsets)
    order_R = np.argsort(lengths_R, kind="stable")
    lengths, first = np.unique(lengths_R[order_R], return_index=True)
    ends = [*first.tolist(), len(order_R)]
    for place, m in enumerate(lengths.tolist()):
        if m:
            rows = order_R[ends[place] : ends[place + 1]]
            yield row_offsets[rows][:, None] + np.arange(m)
