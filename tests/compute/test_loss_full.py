"""The loss on hidden states against dense float64, autograd, finite differences and `kept_loss`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compute import dense_reference as dense
from tests.compute.loss_made import F64, NEG_INF, Sizes
from tip_ray.compute import loss_head
from tip_ray.compute.divergence import token_divergence
from tip_ray.compute.loss import hidden_loss, hidden_loss_with_stats, kept_loss
from tip_ray.contract.errors import DataError, SpecError

torch.set_num_threads(1)

KINDS = [
    {"kind": "reverse_kl"},
    {"kind": "forward_kl"},
    {"kind": "jsd", "beta": 0.5},
    {"kind": "jsd", "beta": 0.1},
    {"kind": "jsd", "beta": 0.0},
    {"kind": "jsd", "beta": 1.0},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


class Hidden:
    """Kept tokens of a student and of a wider teacher; V ids are shared, both heads padded."""

    def __init__(self, seed=0, n=7, d=5, e=8, v=12, pads=(0, 0), sharpness=1.0, dtype=F64):
        random = torch.Generator().manual_seed(seed)

        def made(*shape):
            return torch.randn(*shape, generator=random, dtype=F64)

        self.v = v
        self.hidden = made(n, d).to(dtype).requires_grad_()
        self.head = torch.cat([made(v, d), 60 * torch.ones(pads[0], d)]).to(dtype).requires_grad_()
        self.teacher_hidden = (made(n, e) * sharpness).to(dtype)
        self.teacher_head = torch.cat([made(v, e), 60 * torch.ones(pads[1], e)]).to(dtype)
        self.weight = torch.rand(n, generator=random, dtype=F64)
        self.sampled = torch.randint(v, (n,), generator=random)

    def arguments(self):
        return self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.weight

    def loss(self, **options):
        return hidden_loss(*self.arguments(), **({"vocab_size": self.v} | options))

    def teacher(self):
        """[N, V] float64."""
        logits = self.teacher_hidden.double() @ self.teacher_head[: self.v].double().T
        return logits.log_softmax(-1)

    def reference(self, floor=-30.0, **kind):
        """The support's reference with every id in it."""
        every = torch.arange(self.v).expand(len(self.hidden), -1)
        empty = torch.full((len(self.hidden),), NEG_INF)
        head = self.head[: self.v].double()
        return dense.kept_loss(
            self.hidden.double(), head, every, self.teacher(), empty, self.weight, floor, **kind
        )

    def grads(self, loss):
        return torch.autograd.grad(loss, (self.hidden, self.head), retain_graph=True)


def assert_same(problem, found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)
    for a, b in zip(problem.grads(found), problem.grads(expected), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# --- against dense float64


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 10),
    st.integers(1, 9),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.floats(0.0, 60),
    st.integers(1, 8),
    st.sampled_from(KINDS) | st.builds(dict, kind=st.just("jsd"), beta=st.floats(0.001, 0.999)),
)
def test_equals_the_dense_reference(seed, n, v, e, pads, sharpness, chunk_rows, kind):
    problem = Hidden(seed, n=n, v=v, e=e, pads=pads, sharpness=sharpness)
    found = problem.loss(chunk_rows=chunk_rows, **kind)
    assert_same(problem, found, problem.reference(**kind))


@kinds
def test_equals_the_scored_divergence(kind):
    problem = Hidden(1, sharpness=3.0)
    logits = problem.hidden @ problem.head.T
    theirs = problem.teacher_hidden @ problem.teacher_head.T
    full = token_divergence(logits, theirs, beta=kind.get("beta", 0.5))
    expected = (getattr(full, kind["kind"]) * problem.weight).sum()
    torch.testing.assert_close(problem.loss(**kind), expected)


@kinds
def test_gradients_equal_finite_differences(kind):
    problem = Hidden(2, pads=(2, 3))
    rest = problem.arguments()[2:]

    def loss(hidden, head):
        return hidden_loss(hidden, head, *rest, chunk_rows=3, vocab_size=12, **kind)

    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.head))


@kinds
def test_equals_the_support_of_the_whole_vocabulary(kind):
    problem = Hidden(3, sharpness=4.0)
    every = torch.arange(12).expand(7, -1)
    empty = torch.full((7,), NEG_INF)
    wide = kept_loss(
        problem.hidden,
        problem.head,
        every,
        problem.teacher(),
        problem.weight,
        teacher_tail_logprob_N=empty,
        **kind,
    )
    assert_same(problem, problem.loss(**kind), wide)


@kinds
def test_bfloat16_bits_lose_nothing_of_a_bfloat16_teacher(kind):
    problem = Hidden(4, dtype=torch.float32, sharpness=3.0)
    for name in ("teacher_hidden", "teacher_head"):
        setattr(problem, name, getattr(problem, name).bfloat16())
    narrow = problem.loss(**kind)
    assert narrow.dtype == torch.float32
    assert_same(problem, narrow, problem.reference(**kind).float(), rtol=2e-5, atol=2e-6)


@kinds
def test_a_tied_head_sums_both_gradients(kind):
    problem = Hidden(5)
    embedding, tokens = problem.head, problem.sampled
    problem.hidden = embedding[tokens].tanh()
    found = torch.autograd.grad(problem.loss(**kind), embedding, retain_graph=True)[0]
    expected = torch.autograd.grad(problem.reference(**kind), embedding)[0]
    torch.testing.assert_close(found, expected)


# --- what changes nothing


@kinds
@pytest.mark.parametrize("chunk_rows", [1, 2, 7])
def test_chunks_change_nothing(kind, chunk_rows):
    problem = Hidden(6)
    assert_same(problem, problem.loss(chunk_rows=chunk_rows, **kind), problem.loss(**kind))


@kinds
def test_padded_heads_of_two_sizes_change_nothing(kind):
    plain, padded = Hidden(7), Hidden(7)
    padded.head = torch.cat([plain.head.detach(), torch.full((4, 5), 60.0)]).requires_grad_()
    padded.teacher_head = torch.cat([plain.teacher_head, torch.full((1, 8), -60.0)])
    loss, expected = padded.loss(**kind), plain.loss(**kind)
    torch.testing.assert_close(loss, expected)
    grad_hidden, grad_head = padded.grads(loss)
    torch.testing.assert_close(grad_hidden, plain.grads(expected)[0])
    torch.testing.assert_close(grad_head[:12], plain.grads(expected)[1])
    assert not grad_head[12:].any()
    padded.teacher_head = plain.teacher_head  # by default the smaller head is the vocabulary
    torch.testing.assert_close(hidden_loss(*padded.arguments(), **kind), expected)


@kinds
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_narrow_inputs_and_autocast_change_nothing(kind, head_dtype, monkeypatch):
    monkeypatch.setattr(loss_head, "_CAST_ELEMENTS", 16)  # a few rows of the heads a block
    problem = Hidden(8, dtype=torch.float32)
    hidden, head, teacher_hidden, teacher_head = (
        one.detach().to(dtype)
        for one, dtype in zip(
            problem.arguments()[:4],
            (torch.bfloat16, head_dtype, torch.bfloat16, torch.float16),
            strict=True,
        )
    )
    losses, grads = [], []
    for cast in (torch.Tensor.clone, torch.Tensor.float):
        leaves = [cast(hidden).requires_grad_(), cast(head).requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rest = (cast(teacher_hidden), cast(teacher_head), problem.weight)
            losses.append(hidden_loss(*leaves, *rest, **kind))
        grads.append(torch.autograd.grad(losses[-1], leaves))
    torch.testing.assert_close(*losses)
    for narrow, wide in zip(*grads, strict=True):
        torch.testing.assert_close(narrow, wide.to(narrow.dtype))


def test_no_rows_are_zero_and_still_in_the_graph():
    problem = Hidden(9, n=1)
    hidden, head, teacher_hidden, teacher_head, weight = problem.arguments()
    loss, stats = hidden_loss_with_stats(
        hidden[:0],
        head,
        teacher_hidden[:0],
        teacher_head,
        weight[:0],
        sampled_ids_N=problem.sampled[:0],
    )
    loss.backward()
    assert loss.item() == 0.0
    assert not head.grad.any()
    assert stats.entropy_N.shape == (0,)


# --- the same model, sure models, impossible ids


@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (F64, 1e-14)])
def test_teacher_equal_to_student_gives_zero(kind, dtype, tolerance):
    problem = Hidden(10, dtype=dtype)
    problem.teacher_hidden, problem.teacher_head = problem.hidden.detach(), problem.head.detach()
    loss = problem.loss(**kind)
    assert abs(loss.item()) < tolerance
    for grad in problem.grads(loss):
        assert grad.abs().max() < tolerance


@kinds
@pytest.mark.parametrize("sharpness", [20.0, 200.0])
def test_float32_survives_a_sure_teacher(kind, sharpness):
    wide, narrow = (
        Hidden(11, n=40, sharpness=sharpness, dtype=dtype) for dtype in (F64, torch.float32)
    )
    assert wide.teacher().max(-1).values.min() > -1  # sure, mostly of another id
    found, exact = narrow.loss(**kind), wide.loss(**kind)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    for ours, own in zip(narrow.grads(found), wide.grads(exact), strict=True):
        torch.testing.assert_close(ours.double(), own, rtol=1e-4, atol=1e-4)


@kinds
def test_ids_that_one_side_rules_out_count_as_the_floor(kind):
    """Logits beyond float32 are -inf, as kept_loss sees them on the whole vocabulary."""
    big = 3e38
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    head = torch.tensor([[0.0, 1.0], [1.0, 0.5], [2.0, -big]], requires_grad=True)
    teacher_hidden = torch.tensor([[2.0], [2.0]])
    teacher_head = torch.tensor([[0.5], [-big], [1.0]])
    with torch.no_grad():
        hidden[1, 1] = 2.0
    rest = (teacher_hidden, teacher_head, torch.ones(2))
    loss = hidden_loss(hidden, head, *rest, tail_floor_nats=-25.0, **kind)
    teacher = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    assert teacher.isneginf().sum() == 2
    expected = kept_loss(
        hidden,
        head,
        torch.arange(3).expand(2, -1),
        teacher,
        torch.ones(2),
        teacher_tail_logprob_N=torch.full((2,), NEG_INF),
        tail_floor_nats=-25.0,
        **kind,
    )
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, (hidden, head))
    assert found[1].isfinite().all()
    torch.testing.assert_close(found, torch.autograd.grad(expected, (hidden, head)))


# --- statistics, memory, refusals


def test_statistics_are_the_learners_own_and_carry_no_gradient():
    problem = Hidden(12)
    loss, stats = hidden_loss_with_stats(
        *problem.arguments(), chunk_rows=2, sampled_ids_N=problem.sampled
    )
    assert_same(problem, loss, problem.loss())
    logprobs = (problem.hidden @ problem.head.T).log_softmax(-1)
    expected = logprobs.gather(1, problem.sampled[:, None]).squeeze(1)
    torch.testing.assert_close(stats.sampled_logprob_N, expected)
    torch.testing.assert_close(stats.entropy_N, -(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close((stats.divergence_N * problem.weight).sum(), loss)
    assert not any(value.requires_grad for value in stats)


@kinds
def test_logits_never_exist_for_all_rows(kind, monkeypatch):
    monkeypatch.setattr(loss_head, "_CAST_ELEMENTS", 64)
    n, d, e, v, chunk_rows = 1024, 8, 4, 400, 16
    problem = Hidden(13, n=n, d=d, e=e, v=v, dtype=torch.float32)
    teacher_head = problem.teacher_head.bfloat16()
    with Sizes() as sizes:
        hidden_loss(
            problem.hidden,
            problem.head,
            problem.teacher_hidden,
            teacher_head,
            problem.weight,
            chunk_rows=chunk_rows,
            **kind,
        ).backward()
    assert max(elements for elements, _ in sizes.seen) == max(n * d, chunk_rows * v, v * d)
    assert (v * e, torch.float32) not in sizes.seen
    assert problem.head.grad.any()


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "policy_gradient"},
        {"kind": "kl"},
        {"beta": 1.5},
        {"chunk_rows": 0},
        {"vocab_size": 13},
        {"tail_floor_nats": 0.0},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        Hidden().loss(**options)


@pytest.mark.parametrize("index", range(5))
def test_shapes_that_do_not_fit_are_refused(index):
    arguments = list(Hidden().arguments())
    arguments[index] = arguments[index][..., :-1]
    with pytest.raises(SpecError, match="shape"):
        hidden_loss(*arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["teacher_hidden", "weight"])
def test_a_nan_is_placed_or_ends_in_the_loss(name, bad):
    problem = Hidden(14)
    getattr(problem, name)[3] = bad
    with pytest.raises(DataError, match=rf"{name}_N.* row 3"):
        problem.loss()
    loss, _ = hidden_loss_with_stats(*problem.arguments(), sampled_ids_N=problem.sampled)
    assert not loss.isfinite()
