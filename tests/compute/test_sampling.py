"""Sampling rules: what is drawn how often, and that inverse inclusion weights are unbiased."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compute.selection_made import big_step, spec, steps
from tip_ray.compute.columns import check_columns
from tip_ray.compute.sampling import capped_shares, inclusion_probabilities
from tip_ray.compute.selection import loss_weights, select, select_weighted


def draws(chosen, h, offsets, count):
    """[count, N] what is kept with each of `count` seeds."""
    zeros = np.zeros(len(h))
    return np.stack([select(chosen, h, zeros, zeros, offsets, seed) for seed in range(count)])


# --- entropy_sample


def test_draws_without_replacement_are_proportional_to_entropy():
    h, count = np.array([0.1, 0.2, 0.3, 0.4]), 4000
    seen = draws(spec("entropy_sample"), h, [0, 4], count)
    assert (seen.sum(1) == 2).all()
    for a in range(4):
        for b in range(a + 1, 4):
            # one after the other, the second from what the first left
            expected = h[a] * h[b] / (1 - h[a]) + h[b] * h[a] / (1 - h[b])
            found = (seen[:, a] & seen[:, b]).mean()
            assert found == pytest.approx(expected, abs=5 * (expected / count) ** 0.5)


def test_without_any_entropy_the_draw_is_uniform():
    seen = draws(spec("entropy_sample"), np.array([0.0] * 4 + [0.5] * 2), [0, 4, 6], 2000)
    assert np.abs(seen[:, :4].mean(0) - 0.5).max() < 5 * 0.5 / 2000**0.5
    whole = draws(spec("entropy_sample", scope="batch"), np.zeros(4), [0, 2, 4], 50)
    assert len(np.unique(whole, axis=0)) > 3


def test_positive_weights_first_then_the_earliest():
    h = np.array([0.0, 0.0, 0.3, 0.0, 5e-324, 0.0])
    for scope in ("rollout", "batch"):
        seen = draws(spec("entropy_sample", 4 / 6, scope=scope), h, [0, 6], 20)
        assert (seen == [1, 1, 1, 0, 1, 0]).all()
        assert draws(spec("entropy_sample", 1 / 3, scope=scope), h, [0, 6], 20)[:, [2, 4]].all()


# --- inclusion probabilities


def columns_of(h, offsets):
    zeros = np.zeros(len(h))
    return check_columns(h, zeros, zeros, offsets, 0, None)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.floats(0, 1) | st.sampled_from([0.0, 1.0, 5e-324, 1e-310]), min_size=1, max_size=30
    ),
    st.floats(0.01, 1.0),
)
def test_shares_sum_to_their_budget_and_are_capped_multiples_of_the_weight(values, fraction):
    weight = np.array(values)
    share = capped_shares(weight[None], fraction)[0]
    assert ((share >= 0) & (share <= 1)).all()
    assert share.sum() == pytest.approx(fraction * len(weight), rel=1e-9)
    normal = (weight > 1e-300) & (share < 1) & (share > 0)
    ratio = share[normal] / weight[normal]
    assert ratio == pytest.approx(np.full(len(ratio), ratio[:1].sum()), rel=1e-9)
    if normal.any():  # what is at 1 would be above it
        assert (weight[share == 1] * ratio[0] >= 1 - 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(steps(), st.sampled_from(["entropy_sample", "random"]), st.floats(0.01, 1.0))
def test_inclusion_sums_to_the_retention(step, rule, retention):
    h, _, _, offsets = step
    for scope, ends in (("rollout", offsets), ("batch", [0, offsets[-1]])):
        chosen = spec(rule, retention, scope=scope, reweight="inclusion")
        found = inclusion_probabilities(chosen, columns_of(h, offsets))
        assert (found >= 1e-3).all()
        for start, end in pairwise(ends):
            floored = (found[start:end] == 1e-3).sum() * 1e-3
            assert found[start:end].sum() == pytest.approx(
                retention * (end - start), rel=1e-9, abs=floored + 1e-12
            )


def test_inclusion_by_hand():
    chosen = spec("entropy_sample", 0.5, reweight="inclusion")
    found = inclusion_probabilities(chosen, columns_of(np.array([0.8, 0.1, 0.1, 0.0]), [0, 4]))
    assert found == pytest.approx([1, 0.5, 0.5, 1e-3])
    nothing = inclusion_probabilities(chosen, columns_of(np.zeros(4), [0, 4]))
    assert nothing == pytest.approx([0.5] * 4)


# --- weights


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.lists(st.floats(-5, 5), min_size=8, max_size=8),
    st.integers(1, 7),
    st.sampled_from(["entropy_sample", "random"]),
    st.sampled_from(["token", "rollout"]),
    st.floats(0.05, 0.95),
)
def test_the_weighted_sum_is_unbiased_by_enumeration(h, g, split, rule, normalize, retention):
    """The expectation over all 2^N outcomes is the loss of keeping everything."""
    n = len(h)
    g = np.array(g[:n])
    offsets = [0, min(split, n), n]
    pi = inclusion_probabilities(
        spec(rule, retention, reweight="inclusion"), columns_of(np.array(h), offsets)
    )
    expected = (loss_weights(np.ones(n, bool), np.ones(n), offsets, normalize) * g).sum()
    total = 0.0
    for outcome in product((False, True), repeat=n):
        keep = np.array(outcome)
        chance = np.where(keep, pi, 1 - pi).prod()
        weight = np.where(keep, 1 / pi, 0.0)
        total += (
            chance * (loss_weights(keep, weight, offsets, normalize, divide_by="all") * g).sum()
        )
    assert total == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("rule", ["entropy_sample", "random"])
@pytest.mark.parametrize("normalize", ["token", "rollout"])
@pytest.mark.parametrize("scope", ["rollout", "batch"])
def test_real_draws_are_unbiased_and_the_mean_over_kept_is_not(rule, normalize, scope):
    rng = np.random.default_rng(1)
    h = rng.random(40) ** 2
    g = h + 0.1 * rng.random(40)  # what is likelier kept is larger
    zeros, offsets, count = np.zeros(40), [0, 10, 10, 40], 3000
    chosen = spec(rule, 0.4, scope=scope, reweight="inclusion")
    found, over_kept = np.zeros(count), np.zeros(count)
    for seed in range(count):
        keep, weight = select_weighted(chosen, h, zeros, zeros, offsets, seed)
        found[seed] = (loss_weights(keep, weight, offsets, normalize, divide_by="all") * g).sum()
        over_kept[seed] = (loss_weights(keep, keep, offsets, normalize) * g).sum()
    full = (loss_weights(np.ones(40, bool), np.ones(40), offsets, normalize) * g).sum()
    error = found.std() / count**0.5
    assert found.mean() == pytest.approx(full, abs=5 * error)
    if rule == "entropy_sample":
        assert over_kept.mean() - full > 10 * over_kept.std() / count**0.5


@pytest.mark.parametrize("rule", ["entropy_sample", "random"])
def test_weights_are_the_inverse_inclusion_and_seeded_by_key(rule):
    h, d, f, offsets = big_step(9)
    chosen = spec(rule, 0.3, reweight="inclusion")
    assert chosen.keep_at_least == 0
    keys = [(1, row) for row in range(len(offsets) - 1)]
    keep, weight = select_weighted(chosen, h, d, f, offsets, 5, row_keys=keys)
    pi = inclusion_probabilities(chosen, columns_of(h, offsets))
    assert weight.dtype == np.float32
    assert weight[keep] == pytest.approx(1 / pi[keep], rel=1e-6)
    assert not weight[~keep].any()
    assert np.array_equal(keep, select(chosen, h, d, f, offsets, 5, row_keys=keys))
    rows = np.random.default_rng(0).permutation(len(keys))
    tokens = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
    ends = np.cumsum([0, *np.diff(offsets)[rows]])
    shuffled = select_weighted(
        chosen, h[tokens], d[tokens], f[tokens], ends, 5, row_keys=[keys[row] for row in rows]
    )
    assert np.array_equal(keep[tokens], shuffled[0])
    assert weight[tokens] == pytest.approx(shuffled[1], rel=1e-6)


def test_full_retention_weighs_everything_one():
    step = big_step(10)
    everything = select_weighted(spec("all"), *step)
    for rule in ("entropy_sample", "random"):
        found = select_weighted(spec(rule, 1.0, reweight="inclusion"), *step)
        for a, b in zip(everything, found, strict=True):
            assert np.array_equal(a, b)
