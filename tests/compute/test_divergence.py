from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compute.dense_reference import NEG_INF, coarse, kl, probabilities
from tip_ray.compute.divergence import (
    raw_support_divergence,
    row_statistics,
    support_divergence,
    tail_logprob,
    token_divergence,
)
from tip_ray.contract.errors import SpecError

torch.set_num_threads(1)
FLOOR = -30.0

logit = st.floats(-60, 60, width=32)


@st.composite
def logit_pairs(draw, narrowest=2, widest=12):
    n, v = draw(st.integers(1, 4)), draw(st.integers(narrowest, widest))
    values = draw(st.lists(logit, min_size=2 * n * v, max_size=2 * n * v))
    both = torch.tensor(values, dtype=torch.float64).view(2, n, v)
    return both[0], both[1]


def on_support(logits_NV, ids_NK):
    logprobs_NV = logits_NV.log_softmax(-1)
    return logprobs_NV.gather(1, ids_NK), tail_logprob(logprobs_NV, ids_NK)


# --- whole vocabulary


@settings(max_examples=60, deadline=None)
@given(logit_pairs(), st.integers(1, 5), st.floats(0.05, 0.95))
def test_token_divergence_equals_a_plain_reference(pair, chunk_rows, beta):
    student, teacher = pair
    found = token_divergence(student, teacher, chunk_rows, beta)
    for n in range(len(student)):
        p, q = probabilities(student[n]), probabilities(teacher[n])
        mixture = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
        jsd = beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
        entropy = -math.fsum(a * math.log(a) for a in p if a > 0)
        expected = [entropy, kl(p, q), kl(q, p), jsd]
        for value, reference in zip((field[n].item() for field in found), expected, strict=True):
            assert value == pytest.approx(reference, abs=1e-9, rel=1e-9)


def test_chunks_and_dtypes():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 37, 50) * 4
    whole = token_divergence(student, teacher, chunk_rows=64)
    for chunk_rows in (1, 5, 37):
        parts = token_divergence(student, teacher, chunk_rows=chunk_rows)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b)
    assert whole.jsd.dtype == torch.float32
    assert token_divergence(student.bfloat16(), teacher.bfloat16()).jsd.dtype == torch.float32
    assert token_divergence(student.double(), teacher).jsd.dtype == torch.float64
    assert token_divergence(student[:0], teacher[:0]).entropy.shape == (0,)


def test_jsd_at_its_limits_is_the_two_divergences():
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64)
    low, high = (
        token_divergence(student, teacher, beta=0.0),
        token_divergence(student, teacher, beta=1.0),
    )
    torch.testing.assert_close(low.jsd, low.forward_kl)
    torch.testing.assert_close(high.jsd, high.reverse_kl)
    near = token_divergence(student, teacher, beta=1e-6)
    torch.testing.assert_close(near.jsd / 1e-6, low.forward_kl, rtol=1e-4, atol=1e-6)


def test_uniform_has_full_entropy_and_one_hot_none():
    uniform, one_hot = torch.zeros(1, 16), torch.full((1, 16), NEG_INF)
    one_hot[0, 3] = 5.0
    found = token_divergence(torch.cat([uniform, one_hot]), torch.zeros(2, 16))
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(16), 0.0]))
    assert found.entropy[1].item() == 0.0
    statistics = row_statistics(torch.cat([uniform, one_hot]), 4, 16)
    torch.testing.assert_close(statistics.entropy_N, torch.tensor([math.log(16), 0.0]))
    assert statistics.tail_logprob_N[1].item() == NEG_INF


def test_impossible_ids_make_no_nan():
    student, teacher = torch.tensor([[0.0, NEG_INF, 0.0]]), torch.tensor([[0.0, 0.0, NEG_INF]])
    found = token_divergence(student, teacher)
    assert found.reverse_kl.item() == math.inf
    assert found.forward_kl.item() == math.inf
    assert found.jsd.item() == pytest.approx(0.5 * math.log(2))
    shared = token_divergence(student, student)
    assert shared.reverse_kl.item() == 0.0
    assert shared.jsd.item() == pytest.approx(0.0, abs=1e-7)


def test_no_gradient_flows_through_a_score():
    logits = torch.randn(3, 5, requires_grad=True)
    assert not token_divergence(logits, logits * 2).reverse_kl.requires_grad
    assert not row_statistics(logits, 2, 5).entropy_N.requires_grad


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0),
        (torch.zeros(2, 3), torch.zeros(2, 3), 1, 1.5),
    ],
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(SpecError):
        token_divergence(*arguments)


# --- what is recorded of a row of logits


@settings(max_examples=60, deadline=None)
@given(logit_pairs(narrowest=3), st.data())
def test_row_statistics_equal_a_plain_reference(pair, data):
    logits = pair[0]
    vocab_size = data.draw(st.integers(1, logits.shape[1]))
    k = data.draw(st.integers(1, vocab_size))
    found = row_statistics(logits, k, vocab_size)
    assert found.topk_ids_NK.dtype == torch.int64
    for n in range(len(logits)):
        p = probabilities(logits[n, :vocab_size])
        ids = found.topk_ids_NK[n].tolist()
        assert len(set(ids)) == k
        assert sorted((p[i] for i in ids), reverse=True) == pytest.approx(sorted(p)[::-1][:k])
        assert found.topk_logprobs_NK[n].exp().tolist() == pytest.approx([p[i] for i in ids])
        tail = math.fsum(x for i, x in enumerate(p) if i not in ids)
        assert found.tail_logprob_N[n].exp().item() == pytest.approx(tail, rel=1e-9, abs=1e-300)
        entropy = -math.fsum(a * math.log(a) for a in p if a > 0)
        assert found.entropy_N[n].item() == pytest.approx(entropy, abs=1e-9)
        log_normalizer = found.log_normalizer_N[n].item()
        assert math.exp(logits[n, ids[-1]].item() - log_normalizer) == pytest.approx(p[ids[-1]])


def test_columns_outside_the_shared_vocabulary_change_nothing():
    logits = torch.randn(4, 12)
    loud = torch.cat([logits, torch.full((4, 3), 90.0)], dim=1)
    for a, b in zip(row_statistics(logits, 5, 12), row_statistics(loud, 5, 12), strict=True):
        assert torch.equal(a, b)


def test_a_peaked_row_keeps_its_tail():
    # 1 - sum(exp) is 0 in float32 here: only a logsumexp over the complement sees the tail
    logits = torch.full((1, 1000), -40.0)
    logits[0, 7] = 10.0
    found = row_statistics(logits, 1, 1000)
    assert found.tail_logprob_N.item() == pytest.approx(-50 + math.log(999), abs=1e-4)
    reference = row_statistics(logits.double(), 1, 1000)
    assert found.entropy_N.item() == pytest.approx(reference.entropy_N.item(), rel=1e-4)


def test_support_as_wide_as_the_vocabulary_has_an_empty_tail():
    found = row_statistics(torch.randn(5, 7) * 30, 7, 7)
    assert (found.tail_logprob_N == NEG_INF).all()


def test_row_statistics_at_the_edges():
    assert row_statistics(torch.zeros(0, 9), 3, 9).topk_ids_NK.shape == (0, 3)
    masked = torch.full((1, 6), NEG_INF)
    masked[0, 2] = -1e30
    found = row_statistics(masked, 3, 6)
    assert found.topk_ids_NK[0, 0].item() == 2
    assert found.topk_logprobs_NK[0].tolist() == [0.0, NEG_INF, NEG_INF]
    assert found.entropy_N.item() == 0.0
    assert row_statistics(torch.full((1, 6), math.nan), 3, 6).entropy_N.isnan().all()
    before = torch.randn(2, 6)
    after = before.clone()
    row_statistics(after, 2, 6)
    assert torch.equal(before, after)
    for k, vocab_size in ((0, 6), (7, 6), (2, 8)):
        with pytest.raises(SpecError):
            row_statistics(torch.zeros(1, 6), k, vocab_size)


# --- supports


@settings(max_examples=60, deadline=None)
@given(logit_pairs(widest=9), st.data())
def test_tail_logprob_sums_the_complement(pair, data):
    logprobs = pair[0].log_softmax(-1)
    n, v = logprobs.shape
    k = data.draw(st.integers(1, v))
    ids = torch.tensor([data.draw(st.permutations(range(v)))[:k] for _ in range(n)])
    hidden = st.lists(st.booleans(), min_size=n * k, max_size=n * k)
    ids = ids.masked_fill(torch.tensor(data.draw(hidden)).view(n, k), -1)
    before = logprobs.clone()
    found = tail_logprob(logprobs, ids)
    assert torch.equal(before, logprobs)
    for row in range(n):
        outside = [i for i in range(v) if i not in ids[row].tolist()]
        if not outside:
            assert found[row].item() == NEG_INF
        else:
            expected = torch.logsumexp(logprobs[row, outside], 0).item()
            assert found[row].item() == pytest.approx(expected, abs=1e-10)


@settings(max_examples=80, deadline=None)
@given(logit_pairs(widest=9), st.data())
def test_coarse_graining_lowers_the_divergence_and_the_full_support_does_not(pair, data):
    student, teacher = (side / 4 for side in pair)
    v = student.shape[1]
    k = data.draw(st.integers(1, v))
    ids = torch.tensor([data.draw(st.permutations(range(v)))[:k] for _ in range(len(student))])
    reverse, forward = support_divergence(
        *on_support(student, ids), *on_support(teacher, ids), -500.0
    )
    full = token_divergence(student, teacher)
    assert (reverse <= full.reverse_kl + 1e-9).all()
    assert (forward <= full.forward_kl + 1e-9).all()
    for n in range(len(student)):
        p = coarse(probabilities(student[n]), ids[n].tolist())
        q = coarse(probabilities(teacher[n]), ids[n].tolist())
        assert reverse[n].item() == pytest.approx(kl(p, q), abs=1e-9)
        assert forward[n].item() == pytest.approx(kl(q, p), abs=1e-9)
    if k == v:
        torch.testing.assert_close(reverse, full.reverse_kl, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(forward, full.forward_kl, atol=1e-9, rtol=1e-9)


@settings(max_examples=80, deadline=None)
@given(logit_pairs(widest=9), st.booleans(), st.data())
def test_rounding_never_takes_a_divergence_below_its_noise(pair, same, data):
    student = pair[0].float()
    teacher = student * (1 + 2e-7) if same else pair[1].float()
    k = data.draw(st.integers(1, student.shape[1]))
    ids = student.topk(k).indices
    sides = [
        torch.cat([a, b[:, None]], 1)
        for a, b in (on_support(student, ids), on_support(teacher, ids))
    ]
    for raw in raw_support_divergence(*sides, FLOOR):
        assert (raw >= -1e-6).all()
    clamped = support_divergence(*on_support(student, ids), *on_support(teacher, ids), FLOOR)
    assert all((side >= 0).all() for side in clamped)


def test_an_empty_tail_adds_exactly_nothing():
    a, b = torch.randn(2, 4, 6).log_softmax(-1)
    empty = torch.full((4,), NEG_INF)
    reverse, forward = raw_support_divergence(
        torch.cat([a, empty[:, None]], 1), torch.cat([b, empty[:, None]], 1), FLOOR
    )
    assert torch.equal(reverse, (a.exp() * (a - b)).sum(-1))
    assert torch.equal(forward, -(b.exp() * (a - b)).sum(-1))


def test_both_tails_are_floored():
    lp = torch.tensor([[0.0]])
    reverse, _ = support_divergence(lp, torch.tensor([-80.0]), lp, torch.tensor([-90.0]), FLOOR)
    assert reverse.item() == 0.0
    student = torch.tensor([[math.log(0.5)]], dtype=torch.float64)
    tail = torch.tensor([math.log(0.5)], dtype=torch.float64)
    teacher = torch.zeros(1, 1, dtype=torch.float64)
    reverse, _ = support_divergence(student, tail, teacher, torch.tensor([NEG_INF]), FLOOR)
    assert reverse.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 30))


def test_impossible_support_ids_are_finite_and_finite_ones_exact():
    student = torch.tensor([[math.log(0.5), math.log(0.5)]])
    empty = torch.tensor([NEG_INF])
    reverse, forward = support_divergence(
        student, empty, torch.tensor([[0.0, NEG_INF]]), empty, FLOOR
    )
    assert reverse.item() == pytest.approx(
        0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 30), rel=1e-6
    )
    assert forward.item() == pytest.approx(math.log(2), rel=1e-6)
    reverse, _ = support_divergence(student, empty, torch.tensor([[0.0, -70.0]]), empty, FLOOR)
    assert reverse.item() == pytest.approx(math.log(0.5) + 35, rel=1e-6)  # not floored


def test_padding_of_a_support_is_ignored():
    student, teacher = torch.randn(2, 3, 4).log_softmax(-1)
    tails = torch.full((3,), -3.0), torch.full((3,), -2.0)
    padding = torch.full((3, 2), NEG_INF)
    plain = support_divergence(student, tails[0], teacher, tails[1], FLOOR)
    padded = support_divergence(
        torch.cat([student, padding], 1),
        tails[0],
        torch.cat([teacher, padding], 1),
        tails[1],
        FLOOR,
    )
    for a, b in zip(plain, padded, strict=True):
        torch.testing.assert_close(a, b)
