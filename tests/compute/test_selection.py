from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compute.dense_reference import soft_or_keep, top_of_rows
from tests.compute.selection_made import big_step, nats, spec, steps, unit
from tip_ray.compute.rules import RULES, normalise_step, quantile_lower, soft_or_score
from tip_ray.compute.selection import (
    balance_rows,
    loss_weights,
    normalised_entropy,
    quadrant_thresholds,
    quadrants,
    select,
    select_weighted,
)
from tip_ray.contract.errors import DataError, SpecError

# --- how many


@settings(max_examples=100, deadline=None)
@given(
    steps(),
    st.sampled_from(sorted(RULES)),
    st.floats(0.01, 1.0),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_counts_are_exact_in_every_rollout(step, rule, retention, keep_at_least, seed):
    keep = select(spec(rule, retention, keep_at_least=keep_at_least), *step, seed)
    for start, end in zip(step[3][:-1], step[3][1:], strict=True):
        m = int(end - start)
        k = m if rule == "all" else math.floor(retention * m + 1e-9)
        assert keep[start:end].sum() == min(max(k, keep_at_least), m)


def test_counts_survive_floating_point():
    # 0.1 * 30 and 0.7 * 10 are not whole numbers in binary
    for retention, m, k in ((0.1, 30, 3), (0.7, 10, 7), (0.29, 100, 29), (0.2, 5, 1), (0.5, 5, 2)):
        zeros = np.zeros(m)
        assert select(spec("entropy", retention), zeros, zeros, zeros, [0, m]).sum() == k


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("scope", ["rollout", "batch"])
def test_full_retention_is_the_rule_all(rule, scope):
    step = big_step()
    everything = select_weighted(spec("all"), *step)
    found = select_weighted(spec(rule, 1.0, scope=scope), *step)
    for a, b in zip(everything, found, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


# --- which


@settings(max_examples=100, deadline=None)
@given(steps(), st.floats(0.01, 1.0))
def test_entropy_equals_a_plain_reference(step, retention):
    expected = top_of_rows(step[0].tolist(), step[3].tolist(), retention)
    assert np.array_equal(select(spec("entropy", retention), *step), expected)


# eighths, so that both forms of the score round alike
@settings(max_examples=100, deadline=None)
@given(
    steps(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 1.0, 2.0, 4.0])),
    st.floats(0.01, 1.0),
)
def test_soft_or_equals_a_plain_reference(step, retention):
    expected = soft_or_keep(step[0], step[1], step[3].tolist(), retention)
    assert np.array_equal(select(spec("soft_or", retention), *step), expected)


def test_soft_or_on_a_big_step_equals_a_plain_reference():
    step = big_step(3)
    expected = soft_or_keep(step[0], step[1], step[3].tolist(), 0.3)
    assert np.array_equal(select(spec("soft_or", 0.3), *step), expected)


def test_soft_or_by_hand():
    # hhat 0, .5, 1, 1 (clipped at the third largest of 4 by floor(0.98 * 3) = 2); dhat 1, 0, 0, .5
    h, d = np.array([0.1, 0.3, 0.5, 0.9]), np.array([2.0, 0.0, 0.0, 1.0])
    hhat, dhat = normalise_step(h, d)
    assert hhat == pytest.approx([0, 0.5, 1, 1])
    assert dhat == pytest.approx([1, 0, 0, 0.5])
    assert soft_or_score(hhat, dhat) == pytest.approx([1, 0.5, 1, 1])
    assert select(spec("soft_or", 0.5), h, d, d, [0, 4]).tolist() == [True, False, True, False]


def test_ties_go_to_the_earlier_token():
    same = np.full(6, 0.5)
    for rule in ("entropy", "soft_or"):
        keep = select(spec(rule, 0.5), same, same, same, [0, 4, 6])
        assert keep.tolist() == [True, True, False, False, True, False]
        keep = select(spec(rule, 0.5, scope="batch", keep_at_least=0), same, same, same, [0, 4, 6])
        assert keep.tolist() == [True, True, True, False, False, False]


def test_batch_scope_takes_the_top_of_the_step():
    h = np.array([0.9, 0.8, 0.7, 0.1, 0.2, 0.3])
    zeros = np.zeros(6)
    top = select(spec("entropy", 0.5, scope="batch", keep_at_least=0), h, zeros, zeros, [0, 3, 6])
    assert top.tolist() == [True, True, True, False, False, False]
    each = select(spec("entropy", 0.5, scope="batch", keep_at_least=1), h, zeros, zeros, [0, 3, 6])
    assert each.tolist() == [True, True, True, False, False, True]


def test_edges():
    nothing = np.zeros(0)
    for rule in sorted(RULES):
        for scope in ("rollout", "batch"):
            for offsets in ([0], [0, 0, 0]):
                keep = select(spec(rule, scope=scope), nothing, nothing, nothing, offsets)
                assert keep.shape == (0,)
            assert select(spec(rule, 0.01, scope=scope), [0.3], [0.1], [0.1], [0, 1]).tolist() == [
                True
            ]
    denormal = np.array([5e-324, 0.0, 1e-320])
    assert select(spec("entropy", 0.4), denormal, denormal, denormal, [0, 3]).tolist() == [0, 0, 1]
    assert np.isfinite(np.concatenate(normalise_step(denormal, denormal))).all()


# --- identities of the rules


@settings(max_examples=200, deadline=None)
@given(unit, unit, unit)
def test_soft_or_score_is_bounded_symmetric_and_monotone(a, b, c):
    score = float(soft_or_score(a, b))
    assert max(a, b) <= score <= 1
    assert score == float(soft_or_score(b, a))
    assert score == pytest.approx(1 - (1 - a) * (1 - b), abs=1e-15)
    low, high = min(b, c), max(b, c)
    assert soft_or_score(a, low) <= soft_or_score(a, high) + 1e-15
    assert float(soft_or_score(a, 0)) == a
    assert float(soft_or_score(a, 1)) == 1


@settings(max_examples=60, deadline=None)
@given(steps(divergences=st.just(1.5)), st.floats(0.05, 0.9))
def test_without_a_divergence_soft_or_ranks_by_the_clipped_entropy(step, retention):
    hhat, dhat = normalise_step(step[0], step[1])
    assert not dhat.any()
    expected = top_of_rows(hhat.tolist(), step[3].tolist(), retention)
    assert np.array_equal(select(spec("soft_or", retention), *step), expected)


def test_permuting_the_divergence_moves_only_rules_that_read_it():
    h, d, f, offsets = big_step(1)
    order = np.random.default_rng(2).permutation(len(d))
    blind = {"all", "entropy", "entropy_sample", "random", "prefix"}
    for rule in RULES:
        before = select(spec(rule), h, d, f, offsets)
        after = select(spec(rule), h, d[order], f[order], offsets)
        assert np.array_equal(before, after) is (rule in blind), rule


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 99), st.floats(0.0, 1e6), st.sampled_from(["soft_or", "soft_or_bottom", "q3"])
)
def test_raising_entropies_above_their_clip_changes_nothing(seed, raised_by, rule):
    h, d, f, offsets = big_step(seed, rows=6)
    h = h.astype(np.float64)
    if not len(h):
        return
    above = h > quantile_lower(h, 0.98)
    raised = np.where(above, h + raised_by, h)
    assert np.array_equal(
        select(spec(rule), h, d, f, offsets), select(spec(rule), raised, d, f, offsets)
    )


def test_one_outlier_makes_soft_or_an_entropy_ranking_unless_clipped():
    h, d, f, offsets = big_step(4)
    d[7] = 1e6
    by_entropy = select(spec("entropy"), h, d, f, offsets)
    unclipped = select(spec("soft_or"), h, d, f, offsets)
    clipped = select(spec("soft_or", clip_divergence=True), h, d, f, offsets)
    assert (unclipped != by_entropy).mean() < 0.01
    assert (clipped != by_entropy).mean() > 0.1


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("scope", ["rollout", "batch"])
def test_the_order_of_rollouts_changes_nothing(rule, scope):
    h, d, f, offsets = big_step(5)
    h = np.round(h, 1)  # many ties
    keys = [(1, row // 4, row % 4) for row in range(len(offsets) - 1)]
    keep = select(spec(rule, 0.3, scope=scope), h, d, f, offsets, 11, row_keys=keys)
    rows = np.random.default_rng(0).permutation(len(keys))
    tokens = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
    shuffled = select(
        spec(rule, 0.3, scope=scope),
        h[tokens],
        d[tokens],
        f[tokens],
        np.cumsum([0, *np.diff(offsets)[rows]]),
        11,
        row_keys=[keys[row] for row in rows],
    )
    assert np.array_equal(keep[tokens], shuffled)


def test_random_is_seeded_uniform_and_without_replacement():
    n, draws = 8, 2000
    zeros = np.zeros(n)
    seen = np.stack(
        [select(spec("random", 0.25), zeros, zeros, zeros, [0, n], seed) for seed in range(draws)]
    )
    assert (seen.sum(1) == 2).all()
    # binomial(2000, 1/4): 5 standard deviations are 97
    assert np.abs(seen.sum(0) - draws / 4).max() < 97
    step = big_step(6)
    first, again = (select(spec("random"), *step, 3) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, select(spec("random"), *step, 4))
    keyed = select(spec("random"), *step, 3, row_keys=[("b", row) for row in range(40)])
    assert not np.array_equal(first, keyed)


# --- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("index", "name"), [(0, "entropy"), (1, "reverse_kl"), (2, "forward_kl")])
def test_values_that_are_not_finite_are_named(bad, index, name):
    columns = [np.linspace(0, 1, 9) for _ in range(3)]
    columns[index][6] = bad
    with pytest.raises(DataError, match=rf"{name}.*token 6 \(row 2, position 1\)"):
        select(spec("soft_or"), *columns, [0, 5, 5, 9])


@pytest.mark.parametrize(
    "offsets",
    [
        [],
        [1, 3],
        [0, 2, 1, 3],
        [0, 2],
        [0, 4],
        [[0, 3]],
        3,
        [0, 1.5, 3],
        [0, math.nan, 3],
        "03",
        None,
    ],
)
def test_offsets_that_do_not_fit_are_refused(offsets):
    three = np.zeros(3)
    with pytest.raises(SpecError):
        select(spec("all"), three, three, three, offsets)


def test_columns_that_do_not_fit_are_refused():
    three = np.zeros(3)
    with pytest.raises(SpecError, match="forward_kl"):
        select(spec("all"), three, three, np.zeros(4), [0, 3])
    with pytest.raises(SpecError, match="row_keys"):
        select(spec("random"), three, three, three, [0, 3], row_keys=[(0,), (1,)])
    with pytest.raises(SpecError, match=r"row_keys: found \(1, 2\) twice"):
        select(spec("random"), three, three, three, [0, 1, 3], row_keys=[(1, 2), [1, 2]])


@pytest.mark.parametrize(
    "column",
    [
        *(["a"] * 3, ["1"] * 3, [None] * 3, [[1], [1, 2]], 0.5),
        *(np.zeros(3, complex), np.zeros((3, 1))),
        *(torch.zeros(3, requires_grad=True), torch.zeros(3).bfloat16()),
    ],
)
def test_columns_that_are_no_numbers_are_refused_in_one_line(column):
    three = np.zeros(3)
    with pytest.raises(SpecError, match="reverse_kl") as caught:
        select(spec("soft_or"), three, column, three, [0, 3])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", ["random", "entropy_sample"])
def test_a_key_may_be_a_number_or_a_word(rule):
    h = np.linspace(0.1, 0.9, 40)
    for plain, tuples in (([7, 3], [(7,), (3,)]), (["one", "two"], [("one",), ("two",)])):
        found = select(spec(rule), h, h, h, [0, 20, 40], row_keys=plain)
        assert np.array_equal(found, select(spec(rule), h, h, h, [0, 20, 40], row_keys=tuples))
        assert np.array_equal(
            found, select(spec(rule), h, h, h, [0, 20, 40], row_keys=np.array(plain))
        )


# --- scores and quadrants


@settings(max_examples=100, deadline=None)
@given(st.lists(nats, min_size=1, max_size=80), st.one_of(unit, st.just(0.98)))
def test_quantile_is_an_order_statistic(values, q):
    expected = sorted(values)[math.floor(q * (len(values) - 1))]
    assert quantile_lower(values, q) == expected
    assert quantile_lower(values, q) == np.quantile(values, q, method="lower")


def test_quantile_of_nothing_is_refused():
    with pytest.raises(DataError):
        quantile_lower([], 0.5)


def test_constant_axes_normalise_to_zero():
    for values in normalise_step(np.full(5, 0.7), np.full(5, 3.0)):
        assert values.tolist() == [0.0] * 5


def test_normalised_entropy():
    found = normalised_entropy([0.0, math.log(8), math.log(8) + 1e-7, -1e-9], 8)
    assert found.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert normalised_entropy([0.0], 1).tolist() == [0.0]
    assert normalised_entropy([math.log(2), math.log(4)], 8) == pytest.approx([1 / 3, 2 / 3])


def test_quadrants_are_strictly_above_their_thresholds():
    h, d = [0.9, 0.9, 0.1, 0.1, 0.5, 0.5, 0.9], [2.0, 0.1, 2.0, 0.1, 1.0, 2.0, 1.0]
    found = quadrants(h, d, 0.5, 1.0)
    assert found.dtype == np.uint8
    assert found.tolist() == [1, 2, 3, 4, 4, 3, 2]


def test_quadrant_thresholds_are_quantiles_of_the_step():
    h, d, _, _ = big_step(8)
    found = quadrant_thresholds(h, d, (0.5, 0.9))
    assert found.entropy == np.quantile(h.astype(np.float64), 0.5, method="lower")
    assert found.divergence == np.quantile(d.astype(np.float64), 0.9, method="lower")
    marked = quadrants(h, d, found.entropy, found.divergence)
    assert np.isin(marked, (1, 2)).mean() == pytest.approx(0.5, abs=0.01)
    assert np.isin(marked, (1, 3)).mean() == pytest.approx(0.1, abs=0.01)
    empty = quadrant_thresholds([], [], (0.5, 0.9))
    assert (empty.entropy, empty.divergence) == (0.0, 0.0)


# --- weights and ranks


def test_loss_weights_are_means():
    rng = np.random.default_rng(0)
    offsets = np.array([0, 4, 4, 9, 12])
    keep = np.array([1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    loss, weight = rng.random(12), rng.random(12)
    by_token = loss_weights(keep, weight, offsets, "token")
    assert by_token.dtype == np.float32
    assert (by_token * loss).sum() == pytest.approx((weight * loss)[keep].mean(), rel=1e-6)
    by_rollout = loss_weights(keep, weight, offsets, "rollout")
    means = [(weight * loss)[a:b][keep[a:b]].mean() for a, b in ((0, 4), (4, 9))]
    assert (by_rollout * loss).sum() == pytest.approx(np.mean(means), rel=1e-6)
    for found in (by_token, by_rollout):
        assert not found[~keep].any()


def test_loss_weights_of_nothing_kept():
    for normalize in ("token", "rollout"):
        assert not loss_weights(np.zeros(3, bool), np.ones(3), [0, 3], normalize).any()
        assert loss_weights([], [], [0], normalize).shape == (0,)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 500), max_size=30), st.integers(1, 5))
def test_rows_are_balanced_over_ranks(tokens, ranks):
    found = balance_rows(tokens, ranks)
    assert found.tolist() == balance_rows(tokens, ranks).tolist()
    loads = np.zeros(ranks, np.int64)
    np.add.at(loads, found[found >= 0], np.asarray(tokens, np.int64)[found >= 0])
    assert loads.sum() == sum(tokens)
    for count, rank in zip(tokens, found, strict=True):
        assert (rank == -1) == (count == 0)
    # greedy: the fullest rank without its last, smallest row was the least loaded
    assert loads.max() - loads.min() <= max([t for t in tokens if t], default=0)


def test_balance_by_hand():
    assert balance_rows([5, 9, 5, 0, 1, 4], 2).tolist() == [1, 0, 1, -1, 1, 0]
    with pytest.raises(SpecError):
        balance_rows([1], 0)
