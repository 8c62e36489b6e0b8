"""Every kind of loss against dense float64, autograd, finite differences and enumeration."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compute.loss_made import F64, NEG_INF, Problem, assert_same
from tip_ray.compute.divergence import tail_logprob, token_divergence
from tip_ray.compute.loss import kept_loss, kept_loss_with_stats
from tip_ray.contract.errors import SpecError

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


# --- divergences


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(2, 9),
    st.data(),
    st.floats(0.1, 60),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([-30.0, -2.0]),
    st.sampled_from(KINDS) | st.builds(dict, kind=st.just("jsd"), beta=st.floats(0.001, 0.999)),
)
def test_equals_the_dense_reference(seed, n, v, data, sharpness, chunk_rows, padded, floor, kind):
    k = data.draw(st.integers(1, v))
    problem = Problem(seed, n=n, v=v, k=k, sharpness=sharpness).pad(padded, seed)
    loss = problem.loss(chunk_rows=chunk_rows, tail_floor_nats=floor, **kind)
    assert_same(problem, loss, problem.reference(floor, **kind))


@kinds
def test_gradients_equal_finite_differences(kind):
    problem = Problem(1).pad(0.3)
    _, _, ids, logprobs, weight = problem.arguments()
    options = {"chunk_rows": 3, "teacher_tail_logprob_N": problem.tail, **kind}

    def loss(hidden, head):
        return kept_loss(hidden, head, ids, logprobs, weight, **options)

    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.head))


@kinds
def test_the_whole_vocabulary_as_support_gives_the_full_divergence(kind):
    problem = Problem(2, v=9, k=9)
    logits = problem.hidden @ problem.head.T
    full = token_divergence(logits, problem.teacher, beta=kind.get("beta", 0.5))
    expected = getattr(full, kind["kind"])
    torch.testing.assert_close(problem.loss(**kind), (expected * problem.weight).sum())


@kinds
def test_coarse_graining_never_raises_the_loss(kind):
    losses = [Problem(5, k=k).loss(**kind).item() for k in (12, 8, 3)]
    # the support of a smaller k is part of that of a larger one
    assert losses == sorted(losses, reverse=True)


@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (F64, 1e-14)])
def test_teacher_equal_to_student_gives_zero(kind, dtype, tolerance):
    problem = Problem(6, dtype=dtype)
    problem.teacher = (problem.hidden @ problem.head.T).log_softmax(-1).detach()
    loss = problem.loss(**kind)
    assert abs(loss.item()) < tolerance
    for grad in problem.grads(loss):
        assert grad.abs().max() < tolerance


@kinds
def test_a_tail_below_its_floor_is_a_constant_on_both_sides(kind):
    problem = Problem(5, n=60, v=7, k=5)
    tails = (
        tail_logprob((problem.hidden @ problem.head.T).log_softmax(-1), problem.ids),
        problem.tail,
    )
    below = torch.stack([tail < -2.0 for tail in tails])
    assert {tuple(pair) for pair in below.T.tolist()} == set(product((False, True), repeat=2))
    assert_same(
        problem, problem.loss(tail_floor_nats=-2.0, **kind), problem.reference(-2.0, **kind)
    )


@kinds
def test_padding_and_chunks_change_nothing(kind):
    problem = Problem(9)
    plain = problem.loss(**kind)
    hidden, head, ids, logprobs, weight = problem.arguments()
    for chunk_rows, filler in ((1, NEG_INF), (4, 0.0), (512, float("nan"))):
        padded = kept_loss(
            hidden,
            head,
            torch.cat([ids[:, :1], torch.full((7, 2), -1), ids[:, 1:]], 1),
            torch.cat([logprobs[:, :1], torch.full((7, 2), filler), logprobs[:, 1:]], 1),
            weight,
            chunk_rows=chunk_rows,
            teacher_tail_logprob_N=problem.tail,
            **kind,
        )
        assert_same(problem, padded, plain)


def test_jsd_near_its_limits_is_a_scaled_kl():
    problem = Problem(10, sharpness=0.7)
    for beta, limit in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        near = problem.loss(kind="jsd", beta=beta) / min(beta, 1 - beta)
        assert_same(problem, near, problem.loss(kind=limit), rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("gap", [20.0, 60.0])
def test_float32_gradients_survive_a_student_that_is_sure_and_wrong(kind, gap):
    """The teacher's mass lies in the student's tail of e^-gap: a ratio float32 cannot subtract."""
    hidden = torch.tensor([[1.0, 0.0]], dtype=F64)
    head = torch.tensor([[gap, 0.0], [0.0, 1.0], [0.0, 2.0], [0.3, 0.5]], dtype=F64)
    teacher = torch.tensor([[-12.0, 0.0, -1.0, -3.0]], dtype=F64).log_softmax(-1)
    ids, weight = torch.tensor([[0]]), torch.ones(1, dtype=F64)
    grads = []
    for dtype in (torch.float32, F64):
        inputs = [one.to(dtype).requires_grad_() for one in (hidden, head)]
        loss = kept_loss(*inputs, ids, teacher[:, :1], weight, tail_floor_nats=-100.0, **kind)
        grads.append(torch.autograd.grad(loss, inputs))
    for narrow, exact in zip(*grads, strict=True):
        torch.testing.assert_close(narrow.double(), exact, rtol=1e-4, atol=1e-5)


@kinds
def test_impossible_ids_and_extreme_values_stay_finite(kind):
    hidden = torch.tensor([[1e4], [-1e4], [1e-42], [0.0]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0], [0.0], [5e-45]], requires_grad=True)
    ids = torch.tensor([[0, 1], [0, 1], [2, 3], [3, 0]])
    logprobs = torch.tensor([[0.0, -1e30], [-1e-44, -104.0], [-0.7, -0.7], [NEG_INF, 0.0]])
    tail = torch.tensor([NEG_INF, -103.0, NEG_INF, NEG_INF])
    loss = kept_loss(
        hidden, head, ids, logprobs, torch.ones(4), teacher_tail_logprob_N=tail, **kind
    )
    for grad in torch.autograd.grad(loss, (hidden, head)):
        assert grad.isfinite().all()
    assert loss.isfinite()


# --- policy gradient


class Sampled(Problem):
    """Rows whose support is the sampled token alone."""

    def __init__(self, seed=0, drift=0.0, **sizes):
        super().__init__(seed, k=1, **sizes)
        random = torch.Generator().manual_seed(seed + 1)
        now = (self.hidden @ self.head.T).log_softmax(-1).detach()
        noise = drift * torch.randn(len(now), generator=random, dtype=F64)
        self.recorded = now.gather(1, self.ids).squeeze(1) + noise

    def loss(self, **options):
        return kept_loss(
            *self.arguments(),
            kind="policy_gradient",
            student_logprob_N=self.recorded,
            **options,
        )

    def reference(self, clip=0.2):
        """PPO's clipped surrogate, by autograd."""
        logprob = (self.hidden @ self.head.T).log_softmax(-1).gather(1, self.ids).squeeze(1)
        advantage = self.logprobs.squeeze(1) - self.recorded
        ratio = (logprob - self.recorded).exp()
        bounded = ratio.clamp(1 - clip, 1 + clip)
        return -(self.weight * torch.minimum(ratio * advantage, bounded * advantage)).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.floats(0, 2), st.floats(0.05, 0.9), st.integers(1, 8))
def test_policy_gradient_is_the_clipped_surrogate(seed, drift, clip, chunk_rows):
    problem = Sampled(seed, drift)
    loss = problem.loss(clip=clip, chunk_rows=chunk_rows)
    assert_same(problem, loss, problem.reference(clip))


def test_a_clipped_token_pushes_nothing():
    problem = Sampled(3, n=1)
    for drift, better, pushes in ((0.5, 1, False), (0.5, -1, True), (-0.5, -1, False)):
        now = (problem.hidden @ problem.head.T).log_softmax(-1).gather(1, problem.ids)
        problem.recorded = (now.squeeze(1) - drift).detach()
        problem.teacher = (problem.recorded[:, None] + better).expand_as(problem.teacher)
        moved = any(grad.abs().max() > 1e-12 for grad in problem.grads(problem.loss()))
        assert moved is pushes


def test_expected_gradient_at_ratio_one_is_that_of_the_full_reverse_kl():
    """Over every token of the vocabulary, each weighed with how likely it is drawn."""
    v = 11
    problem = Problem(4, n=1, v=v)
    logprobs = (problem.hidden @ problem.head.T).log_softmax(-1)
    drawn = logprobs.detach().squeeze(0)
    every = torch.arange(v)
    loss = kept_loss(
        problem.hidden.expand(v, -1),
        problem.head,
        every[:, None],
        problem.teacher.T,
        drawn.exp(),
        kind="policy_gradient",
        student_logprob_N=drawn,
    )
    full = (logprobs.exp() * (logprobs - problem.teacher)).sum()
    torch.testing.assert_close(loss, full)
    for found, expected in zip(problem.grads(loss), problem.grads(full), strict=True):
        assert expected.abs().max() > 0.01  # a top-K KL as advantage would expect 0
        torch.testing.assert_close(found, expected)


def test_a_divergence_of_the_whole_token_as_advantage_would_expect_no_gradient():
    """What the form above must not be: E[A d ln p] = A d sum(p) = 0 where A is the same for all."""
    v, k = 11, 4
    problem = Problem(4, n=1, v=v, k=k)
    logprobs = (problem.hidden @ problem.head.T).log_softmax(-1).squeeze(0)
    top_k_kl = kept_loss(*problem.arguments()[:4], torch.ones(1, dtype=F64)).detach()
    assert top_k_kl > 0.1
    wrong = (logprobs.detach().exp() * top_k_kl * logprobs).sum()
    for grad in problem.grads(wrong):
        assert grad.abs().max() < 1e-14
    every = torch.arange(v)
    drawn = logprobs.detach()
    as_teacher = (drawn - top_k_kl)[:, None]  # the same wrong advantage through the loss itself
    loss = kept_loss(
        problem.hidden.expand(v, -1),
        problem.head,
        every[:, None],
        as_teacher,
        drawn.exp(),
        kind="policy_gradient",
        student_logprob_N=drawn,
    )
    for grad in problem.grads(loss):
        assert grad.abs().max() < 1e-14


def test_expected_gradient_over_a_sequence_is_that_of_the_sum_of_its_tokens():
    """Three tokens drawn on their own: every one of the v^3 outcomes by its probability."""
    v, n = 5, 3
    problem = Problem(6, n=n, v=v)
    logprobs = (problem.hidden @ problem.head.T).log_softmax(-1)
    full = (problem.weight[:, None] * logprobs.exp() * (logprobs - problem.teacher)).sum()
    total = torch.zeros((), dtype=F64)
    for outcome in product(range(v), repeat=n):
        ids = torch.tensor(outcome)[:, None]
        drawn = logprobs.detach().gather(1, ids).squeeze(1)
        total = total + drawn.sum().exp() * kept_loss(
            problem.hidden,
            problem.head,
            ids,
            problem.teacher.gather(1, ids),
            problem.weight,
            kind="policy_gradient",
            student_logprob_N=drawn,
        )
    assert_same(problem, total, full)


def test_gradients_of_policy_gradient_equal_finite_differences():
    problem = Sampled(8, 0.1)
    now = (problem.hidden @ problem.head.T).log_softmax(-1).gather(1, problem.ids).squeeze(1)
    ratio = (now - problem.recorded).exp()
    assert ((ratio - 0.8).abs() > 1e-4).all()  # no kink within the step of the differences
    assert ((ratio - 1.2).abs() > 1e-4).all()

    def loss(hidden, head):
        return kept_loss(
            hidden,
            head,
            *problem.arguments()[2:],
            kind="policy_gradient",
            chunk_rows=3,
            student_logprob_N=problem.recorded,
        )

    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.head))


@pytest.mark.parametrize("vocab_size", [None, 6])
def test_policy_gradient_of_a_sampled_id_is_of_the_shared_vocabulary(vocab_size):
    """Ids that the head has on top are outside of every softmax."""
    problem = Sampled(9, v=8, n=5)
    problem.ids = torch.tensor([[0], [5], [3], [2], [1]])
    head = problem.head if vocab_size is None else problem.head[:vocab_size]
    now = (problem.hidden @ head.T).log_softmax(-1).gather(1, problem.ids).squeeze(1)
    problem.recorded = now.detach()
    loss = problem.loss(vocab_size=vocab_size)
    advantage = (problem.logprobs.squeeze(1) - problem.recorded).detach()
    expected = -(problem.weight * advantage * (now - problem.recorded).exp()).sum()
    assert_same(problem, loss, expected)


# --- rounding


@kinds
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999), st.floats(1e-8, 1.0), st.floats(0.1, 80.0), st.integers(1, 30))
def test_rounding_never_takes_a_loss_below_its_noise(kind, seed, apart, sharpness, k):
    """Nothing is clamped on its way into the loss: near-equal and peaked teachers, in float32."""
    problem = Problem(seed, n=4, d=6, v=30, k=k, dtype=torch.float32)
    hidden, head = problem.hidden.detach(), problem.head.detach() * sharpness / 6
    logits = hidden @ head.T
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    problem.teacher = (logits + apart * noise).log_softmax(-1)
    _, stats = kept_loss_with_stats(
        hidden,
        head,
        problem.ids,
        problem.logprobs,
        torch.ones(4),
        teacher_tail_logprob_N=problem.tail,
        sampled_ids_N=problem.sampled,
        **kind,
    )
    assert (stats.divergence_N >= -1e-6).all()


def test_policy_gradient_needs_the_sampled_token_and_its_probability():
    problem = Problem(0, k=1)
    with pytest.raises(SpecError, match="policy_gradient"):
        problem.loss(kind="policy_gradient")
    wide = Problem(0, k=2)
    with pytest.raises(SpecError, match="K = 2"):
        wide.loss(kind="policy_gradient", student_logprob_N=wide.weight)


def test_statistics_of_policy_gradient_are_its_terms():
    problem = Sampled(5, 0.3)
    loss, stats = kept_loss_with_stats(
        *problem.arguments(),
        kind="policy_gradient",
        sampled_ids_N=problem.ids.squeeze(1),
        student_logprob_N=problem.recorded,
    )
    assert_same(problem, loss, problem.reference())
    torch.testing.assert_close((stats.divergence_N * problem.weight).sum(), loss)
