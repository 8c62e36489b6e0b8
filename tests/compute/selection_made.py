"""Specs and steps for tests of the selection."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tip_ray.contract.spec import SelectionSpec

unit = st.floats(0, 1)
nats = st.floats(0, 50)


def spec(rule="soft_or", retention=0.5, **more):
    if rule == "all":
        return SelectionSpec(rule=rule, **more)
    return SelectionSpec(rule=rule, retention=retention, **more)


@st.composite
def steps(draw, entropies=unit, divergences=nats):
    """(entropy, reverse_kl, forward_kl, row_offsets) of a small step, empty rows included."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=0, max_size=6))
    n = sum(lengths)
    columns = [
        np.array(draw(st.lists(kind, min_size=n, max_size=n)), np.float64)
        for kind in (entropies, divergences, divergences)
    ]
    return (*columns, np.cumsum([0, *lengths]))


def big_step(seed=0, rows=40):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 60, rows)
    n = int(lengths.sum())
    h, d, f = rng.random(n), rng.exponential(size=n), rng.exponential(size=n)
    return (
        h.astype(np.float32),
        d.astype(np.float32),
        f.astype(np.float32),
        np.cumsum([0, *lengths]),
    )
