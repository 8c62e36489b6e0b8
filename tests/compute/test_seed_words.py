"""Many seeds at once against NumPy's own objects, one a seed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compute.selection_made import big_step
from tip_ray.compute.columns import check_columns
from tip_ray.compute.sampling import uniform_draws
from tip_ray.compute.seed_words import generators, seed_words
from tip_ray.contract.seeds import derive_seed

EDGES = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from(EDGES), max_size=20))
def test_words_are_those_of_numpys_seed_sequence(seeds):
    found = seed_words(seeds)
    assert found.shape == (len(seeds), 4)
    for seed, words in zip(seeds, found, strict=True):
        expected = np.random.SeedSequence(seed).generate_state(4, np.uint64)
        assert np.array_equal(words, expected)


def test_generators_draw_what_numpys_do():
    for seed, one in zip(EDGES, generators(EDGES), strict=True):
        other = np.random.default_rng(seed)
        assert np.array_equal(one.random(7), other.random(7))
        assert np.array_equal(one.gumbel(size=7), other.gumbel(size=7))


def test_a_rollouts_draws_are_those_of_its_key():
    h, d, f, offsets = big_step()
    keys = [(1, row // 4, row % 4) for row in range(len(offsets) - 1)]
    found = uniform_draws(check_columns(h, d, f, offsets, 11, keys))
    for row, key in enumerate(keys):
        m = offsets[row + 1] - offsets[row]
        expected = np.random.default_rng(derive_seed(11, *key)).random(m)
        assert np.array_equal(found[offsets[row] : offsets[row + 1]], expected)
