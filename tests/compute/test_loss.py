from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compute.loss_made import F64, NEG_INF, Problem, Sizes, assert_same
from tip_ray.compute import loss_head
from tip_ray.compute.divergence import support_divergence, tail_logprob, token_divergence
from tip_ray.compute.loss import kept_loss, kept_loss_with_stats
from tip_ray.contract.errors import SpecError

torch.set_num_threads(1)


# --- against dense float64


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(2, 10),
    st.data(),
    st.floats(0.1, 60),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([-30.0, -2.0]),  # -2: a floor that real tails fall below
)
def test_equals_the_dense_reference(seed, n, v, data, sharpness, chunk_rows, padded, floor):
    k = data.draw(st.integers(1, v))
    problem = Problem(seed, n=n, v=v, k=k, sharpness=sharpness).pad(padded, seed)
    loss = problem.loss(chunk_rows=chunk_rows, tail_floor_nats=floor)
    assert_same(problem, loss, problem.reference(floor))


@pytest.mark.parametrize("sharpness", [0.5, 40.0])
def test_a_sharp_student_equals_the_dense_reference(sharpness):
    problem = Problem(3, sharpness=sharpness)
    with torch.no_grad():
        problem.head.mul_(20)
    assert_same(problem, problem.loss(tail_floor_nats=-300.0), problem.reference(-300.0))


def test_gradients_equal_finite_differences():
    problem = Problem(1).pad(0.3)
    ids, logprobs, weight, tail = problem.ids, problem.logprobs, problem.weight, problem.tail

    def loss(hidden, head):
        return kept_loss(
            hidden,
            head,
            ids,
            logprobs,
            weight,
            chunk_rows=3,
            teacher_tail_logprob_N=tail,
            vocab_size=12,
        )

    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.head))


def test_the_whole_vocabulary_as_support_gives_the_full_divergence():
    problem = Problem(2, v=9, k=9)
    full = token_divergence(problem.hidden @ problem.head.T, problem.teacher).reverse_kl
    torch.testing.assert_close(problem.loss(), (full * problem.weight).sum())
    # without a given tail it is still exactly empty, whatever 1 - sum(exp) is off by
    hidden, head, ids, logprobs, weight = problem.arguments()
    empty = torch.full((7,), NEG_INF)
    for off in (0.0, 1e-3, -1e-3):
        arguments = (hidden, head, ids, logprobs - off, weight)
        given = kept_loss(*arguments, teacher_tail_logprob_N=empty)
        assert kept_loss(*arguments).item() == given.item()


def test_agrees_with_what_is_scored():
    problem = Problem(4)
    logprobs = (problem.hidden @ problem.head.T).log_softmax(-1).detach()
    scored, _ = support_divergence(
        logprobs.gather(1, problem.ids),
        tail_logprob(logprobs, problem.ids),
        problem.logprobs,
        problem.tail,
        -30.0,
    )
    torch.testing.assert_close(problem.loss(), (scored * problem.weight).sum())


def test_coarse_graining_never_raises_the_loss():
    wide, narrow = Problem(5, k=12), Problem(5, k=3)
    assert narrow.loss().item() < wide.loss().item()


def test_teacher_equal_to_student_gives_zero():
    for dtype, tolerance in ((torch.float32, 2e-6), (F64, 1e-14)):
        problem = Problem(6, dtype=dtype)
        problem.teacher = (problem.hidden @ problem.head.T).log_softmax(-1).detach()
        loss = problem.loss()
        assert abs(loss.item()) < tolerance
        for grad in problem.grads(loss):
            assert grad.abs().max() < tolerance


# --- what changes nothing


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 7, 512])
def test_chunk_size_changes_nothing(chunk_rows):
    problem = Problem(7)
    assert_same(problem, problem.loss(chunk_rows=chunk_rows), problem.loss())


def test_row_order_and_split_change_nothing():
    problem = Problem(8, n=9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    hidden, head, ids, logprobs, weight = problem.arguments()
    tail = problem.tail
    parts = [
        kept_loss(hidden[i], head, ids[i], logprobs[i], weight[i], teacher_tail_logprob_N=tail[i])
        for i in (order[:2], order[2:])
    ]
    assert_same(problem, parts[0] + parts[1], problem.loss())


def test_padding_of_the_support_changes_nothing():
    problem = Problem(9)
    plain = problem.loss()
    hidden, head, ids, logprobs, weight = problem.arguments()
    for filler in (NEG_INF, 0.0, math.nan):
        padded = kept_loss(
            hidden,
            head,
            torch.cat([torch.full((7, 2), -1), ids], 1),
            torch.cat([torch.full((7, 2), filler, dtype=F64), logprobs], 1),
            weight,
            teacher_tail_logprob_N=problem.tail,
        )
        assert_same(problem, padded, plain)


def test_head_rows_outside_the_vocabulary_change_nothing():
    problem = Problem(10)
    plain = problem.loss()
    hidden, head, ids, logprobs, weight = problem.arguments()
    wide = torch.cat([head.detach(), torch.full((3, 5), 50.0, dtype=F64)]).requires_grad_()
    tail = problem.tail
    loss = kept_loss(
        hidden, wide, ids, logprobs, weight, teacher_tail_logprob_N=tail, vocab_size=12
    )
    torch.testing.assert_close(loss, plain)
    grad_hidden, grad_wide = torch.autograd.grad(loss, (hidden, wide))
    expected_hidden, expected_head = problem.grads(plain)
    torch.testing.assert_close(grad_hidden, expected_hidden)
    torch.testing.assert_close(grad_wide[:12], expected_head)
    assert not grad_wide[12:].any()


def test_autocast_around_it_changes_nothing():
    problem = Problem(11, dtype=torch.float32)
    plain = problem.loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(problem, problem.loss(), plain, rtol=0, atol=0)


def test_dropped_positions_get_no_gradient():
    problem = Problem(12)
    trunk = torch.randn(11, 5, dtype=F64, requires_grad=True)
    kept = torch.tensor([0, 2, 3, 5, 7, 8, 10])
    _, head, ids, logprobs, weight = problem.arguments()
    weight[2] = 0.0
    tail = problem.tail
    kept_loss(trunk[kept], head, ids, logprobs, weight, teacher_tail_logprob_N=tail).backward()
    dropped = [1, 3, 4, 6, 9]  # 3 is kept with weight 0
    assert not trunk.grad[dropped].any()
    assert trunk.grad[[0, 2, 5, 7, 8, 10]].any(1).all()


# --- tails and impossible ids


def test_floored_tails_push_nothing():
    problem = Problem(13, n=1, d=2, v=3, k=1)
    problem.ids = torch.tensor([[0]])
    with torch.no_grad():
        problem.hidden.copy_(torch.tensor([[1.0, 0.0]]))
        problem.head.copy_(torch.tensor([[60.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
    problem.teacher = torch.tensor([[0.0, -10.0, -20.0]], dtype=F64).log_softmax(-1)
    assert_same(problem, problem.loss(), problem.reference())
    floor_term = math.exp(-30) * (-30 - problem.tail.item())
    assert problem.loss().item() == pytest.approx(
        problem.weight.item() * (floor_term - problem.logprobs.item())
    )
    without_floor = problem.loss(tail_floor_nats=-100.0)
    assert_same(problem, without_floor, problem.reference(-100.0), rtol=1e-6, atol=1e-30)


def test_a_missing_tail_is_what_the_support_leaves():
    problem = Problem(14)
    assert_same(problem, kept_loss(*problem.arguments()), problem.loss())
    hidden, head, ids, _, weight = problem.arguments()
    # a support that holds all of the teacher's mass, or a rounding more, leaves the floor
    certain = torch.full(ids.shape, math.log(0.25 + 1e-9), dtype=F64)
    floored = torch.full((7,), -30.0)
    assert_same(
        problem,
        kept_loss(hidden, head, ids, certain, weight),
        kept_loss(hidden, head, ids, certain, weight, teacher_tail_logprob_N=floored),
    )


def test_impossible_teacher_ids_count_as_the_floor():
    problem = Problem(15)
    problem.teacher = problem.teacher.clone()
    problem.teacher[torch.arange(7), problem.ids[:, 1]] = NEG_INF
    loss = problem.loss(tail_floor_nats=-25.0)
    assert loss.isfinite()
    assert_same(problem, loss, problem.reference(-25.0))


def test_impossible_student_ids_and_extreme_values_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4], [1e-42], [0.0]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0], [0.0], [5e-45]], requires_grad=True)
    ids = torch.tensor([[0, 1], [0, 1], [2, 3], [3, 0]])
    logprobs = torch.tensor([[0.0, -1e30], [-1e-44, -104.0], [-0.7, -0.7], [NEG_INF, 0.0]])
    tail = torch.tensor([NEG_INF, -103.0, NEG_INF, NEG_INF])
    loss = kept_loss(hidden, head, ids, logprobs, torch.ones(4), teacher_tail_logprob_N=tail)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert head.grad.isfinite().all()


def test_a_nan_is_never_hidden():
    problem = Problem(16)
    with torch.no_grad():
        problem.hidden[3, 1] = math.nan
    assert problem.loss().isnan()


# --- types, graph, statistics


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_in_float32(hidden_dtype, head_dtype, monkeypatch):
    monkeypatch.setattr(loss_head, "_CAST_ELEMENTS", 16)  # three rows of the head a block
    problem = Problem(17, dtype=torch.float32)
    hidden = problem.hidden.detach().to(hidden_dtype).requires_grad_()
    head = problem.head.detach().to(head_dtype).requires_grad_()
    _, _, ids, logprobs, weight = problem.arguments()
    loss = kept_loss(hidden, head, ids, logprobs, weight, teacher_tail_logprob_N=problem.tail)
    assert loss.dtype == torch.float32
    wide_hidden = hidden.detach().float().requires_grad_()
    wide_head = head.detach().float().requires_grad_()
    wide = kept_loss(
        wide_hidden, wide_head, ids, logprobs, weight, teacher_tail_logprob_N=problem.tail
    )
    torch.testing.assert_close(loss, wide)
    loss.backward()
    wide.backward()
    for narrow, exact in ((hidden, wide_hidden), (head, wide_head)):
        assert narrow.grad.dtype == narrow.dtype
        torch.testing.assert_close(narrow.grad, exact.grad.to(narrow.dtype))


def test_no_rows_are_zero_and_still_in_the_graph():
    problem = Problem(18, n=1)
    hidden, head, ids, logprobs, weight = problem.arguments()
    loss, stats = kept_loss_with_stats(
        hidden[:0], head, ids[:0], logprobs[:0], weight[:0], sampled_ids_N=problem.sampled[:0]
    )
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not head.grad.any()
    assert stats.divergence_N.shape == (0,)


def test_a_tied_head_sums_both_gradients():
    problem = Problem(19)
    tokens = torch.tensor([1, 4, 2, 2, 0, 11, 7])
    embedding = problem.head
    loss = kept_loss(
        embedding[tokens].tanh(),
        embedding,
        problem.ids,
        problem.logprobs,
        problem.weight,
        teacher_tail_logprob_N=problem.tail,
    )
    problem.hidden = embedding[tokens].tanh()
    found = torch.autograd.grad(loss, embedding)[0]
    expected = torch.autograd.grad(problem.reference(), embedding)[0]
    torch.testing.assert_close(found, expected)


def test_backward_scales_and_repeats():
    problem = Problem(20)
    loss = problem.loss()
    first = torch.autograd.grad(loss, (problem.hidden, problem.head), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (problem.hidden, problem.head))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3 * a, b)
    frozen = kept_loss(problem.hidden, problem.head.detach(), *problem.arguments()[2:])
    assert torch.autograd.grad(frozen, problem.hidden)[0].shape == problem.hidden.shape
    with torch.no_grad():
        assert not problem.loss().requires_grad


def test_statistics_are_the_learners_own_and_carry_no_gradient():
    problem = Problem(21)
    loss, stats = kept_loss_with_stats(
        *problem.arguments(),
        chunk_rows=2,
        teacher_tail_logprob_N=problem.tail,
        sampled_ids_N=problem.sampled,
    )
    assert_same(problem, loss, problem.loss())
    logprobs = (problem.hidden @ problem.head.T).log_softmax(-1)
    expected = logprobs.gather(1, problem.sampled[:, None]).squeeze(1)
    torch.testing.assert_close(stats.sampled_logprob_N, expected)
    torch.testing.assert_close(stats.entropy_N, -(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close((stats.divergence_N * problem.weight).sum(), loss)
    assert not any(value.requires_grad for value in stats)


def test_logits_never_exist_for_all_rows():
    n, d, v, chunk_rows = 1024, 8, 400, 16
    problem = Problem(22, n=n, d=d, v=v, k=3, dtype=torch.float32)
    arguments, tail = problem.arguments(), problem.tail.float()
    with Sizes() as sizes:
        loss, _ = kept_loss_with_stats(
            *arguments,
            chunk_rows=chunk_rows,
            teacher_tail_logprob_N=tail,
            sampled_ids_N=problem.sampled,
        )
        loss.backward()
    assert max(elements for elements, _ in sizes.seen) == max(n * d, chunk_rows * v, v * d)
    assert problem.head.grad.any()


def test_a_narrow_head_is_never_cast_as_a_whole(monkeypatch):
    monkeypatch.setattr(loss_head, "_CAST_ELEMENTS", 64)
    problem = Problem(23, n=5, d=8, v=400, k=3, dtype=torch.bfloat16)
    hidden, head, ids, logprobs, weight = problem.arguments()
    with Sizes() as sizes:
        kept_loss(hidden, head.detach(), ids, logprobs, weight, chunk_rows=4).backward()
    assert (400 * 8, torch.float32) not in sizes.seen
    assert (8 * 8, torch.float32) in sizes.seen


# --- refusals


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "kl"},
        {"kind": "jsd", "beta": 1.5},
        {"chunk_rows": 0},
        {"vocab_size": 13},
        {"vocab_size": 11},  # below the largest id of the support
        {"kind": "policy_gradient"},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(SpecError):
        Problem().loss(**options)


@pytest.mark.parametrize("index", range(5))
def test_shapes_that_do_not_fit_are_refused(index):
    arguments = list(Problem().arguments())
    arguments[index] = arguments[index][..., :-1]
    with pytest.raises(SpecError, match="shape"):
        kept_loss(*arguments)
