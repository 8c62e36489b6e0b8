"""Per-token entropy and divergences in nats, chunked, on the whole vocabulary or on a support.

N  tokens        V  shared vocabulary        K  ids of a token's support; id -1 = padding

A support is some ids of the vocabulary; all others form one tail bucket. Its log-mass is always a
logsumexp over the complement: teachers are so peaked that 1 - sum(exp) is rounding noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tip_ray.contract.errors import SpecError

_NEG_INF = float("-inf")


class RowStatistics(NamedTuple):
    """What is recorded of each row of logits, over the shared vocabulary at temperature 1."""

    entropy_N: Tensor  # nats; exact
    topk_ids_NK: Tensor  # int64; most probable first
    topk_logprobs_NK: Tensor  # nats
    tail_logprob_N: Tensor  # nats; logsumexp outside the top K; -inf if K = V
    log_normalizer_N: Tensor  # logprob of id i = logits[i] - log_normalizer


class TokenDivergence(NamedTuple):
    """One value a token, in nats; `entropy` is the student's."""

    entropy: Tensor  # [N]
    reverse_kl: Tensor  # [N]; KL(student || teacher)
    forward_kl: Tensor  # [N]; KL(teacher || student)
    jsd: Tensor  # [N]


@torch.no_grad()
def row_statistics(logits_NV: Tensor, k: int, vocab_size: int) -> RowStatistics:
    """Exact entropy, top-K and tail of each row; columns from `vocab_size` on do not take part.

    Computed in float32 (float64 stays float64), about three buffers of the size of `logits_NV`.
    A row of NaN or without any finite logit gives NaN.

    Raises:
        SpecError: `k` is not in 1..vocab_size, or there are fewer columns than `vocab_size`.
    """
    if logits_NV.shape[1] < vocab_size:
        raise SpecError("vocab_size", str(vocab_size), f"at most {logits_NV.shape[1]} columns")
    if not 1 <= k <= vocab_size:
        raise SpecError("support.k", str(k), f"1 to the vocabulary's {vocab_size} ids")
    shared_NV = logits_NV[:, :vocab_size].to(compute_dtype(logits_NV))
    logprobs_NV = shared_NV.log_softmax(-1)
    entropy_N = entropy(logprobs_NV)
    top_NK, ids_NK = logprobs_NV.topk(k, dim=-1)
    first_N1 = ids_NK[:, :1]
    log_normalizer_N = (shared_NV.gather(1, first_N1) - top_NK[:, :1]).squeeze(1)
    tail_N = logprobs_NV.scatter_(1, ids_NK, _NEG_INF).logsumexp(-1)
    return RowStatistics(entropy_N, ids_NK, top_NK, tail_N, log_normalizer_N)


@torch.no_grad()
def token_divergence(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, chunk_rows: int = 512, beta: float = 0.5
) -> TokenDivergence:
    """Divergences of each token over the whole vocabulary: scores, so no gradient flows.

    jsd = beta KL(T||M) + (1 - beta) KL(S||M), M = beta T + (1 - beta) S; beta 0 and 1 stand for
    the forward and the reverse KL. Computed in float32, or float64 if either input is; a few
    [chunk_rows, V] buffers. A KL is +inf where one side rules out what the other holds possible.

    Raises:
        SpecError: the shapes differ, chunk_rows < 1, or beta is not in [0, 1].
    """
    if student_logits_NV.shape != teacher_logits_NV.shape or student_logits_NV.ndim != 2:
        found = f"{tuple(student_logits_NV.shape)} and {tuple(teacher_logits_NV.shape)}"
        raise SpecError("student and teacher logits", found, "two equal shapes [N, V]")
    if chunk_rows < 1:
        raise SpecError("chunk_rows", str(chunk_rows), "at least 1")
    if not 0 <= beta <= 1:
        raise SpecError("beta", str(beta), "a number from 0 to 1")
    dtype = compute_dtype(student_logits_NV, teacher_logits_NV)
    out_4N = student_logits_NV.new_empty((4, len(student_logits_NV)), dtype=dtype)
    for start in range(0, len(student_logits_NV), chunk_rows):
        rows = slice(start, start + chunk_rows)
        student_NV = student_logits_NV[rows].to(dtype).log_softmax(-1)
        teacher_NV = teacher_logits_NV[rows].to(dtype).log_softmax(-1)
        out_4N[0, rows] = entropy(student_NV)
        out_4N[1, rows] = _relative_entropy(student_NV, teacher_NV)
        out_4N[2, rows] = _relative_entropy(teacher_NV, student_NV)
        out_4N[3, rows] = _jsd(student_NV, teacher_NV, beta)
    return TokenDivergence(*out_4N.clamp_(min=0))


def tail_logprob(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """[N] log-mass outside `ids_NK` (int64; -1 is ignored); -inf where nothing is outside.

    Given logits instead, the result is that log-mass plus the row's log-normalizer.
    """
    return drop_ids_(logprobs_NV.to(compute_dtype(logprobs_NV), copy=True), ids_NK).logsumexp(-1)


def drop_ids_(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Set `ids_NK` to -inf in place; padding -1 changes nothing."""
    # Adding lets padding (adds 0 at id 0) and a real id 0 (adds -inf) meet in one row.
    change_NK = torch.zeros_like(ids_NK, dtype=logprobs_NV.dtype).masked_fill_(
        ids_NK >= 0, _NEG_INF
    )
    return logprobs_NV.scatter_add_(1, ids_NK.clamp(min=0), change_NK)


def support_divergence(
    student_logprobs_NK: Tensor,
    student_tail_N: Tensor,
    teacher_logprobs_NK: Tensor,
    teacher_tail_N: Tensor,
    tail_floor_nats: float,
) -> tuple[Tensor, Tensor]:
    """(reverse_kl_N, forward_kl_N) on a support with its tail bucket, clamped at 0 from rounding.

    Both tails are floored at `tail_floor_nats`, so the tail's term is exactly 0 where both are
    empty (support = vocabulary). An id that one side rules out (-inf) counts there as
    `tail_floor_nats`, where the exact KL would be +inf; finite log-probabilities are never
    changed. Padding is -inf on both sides. Never above the KL over the whole vocabulary.
    """
    student_NJ = torch.cat([student_logprobs_NK, student_tail_N[:, None]], dim=1)
    teacher_NJ = torch.cat([teacher_logprobs_NK, teacher_tail_N[:, None]], dim=1)
    reverse_N, forward_N = raw_support_divergence(student_NJ, teacher_NJ, tail_floor_nats)
    return reverse_N.clamp(min=0), forward_N.clamp(min=0)


def raw_support_divergence(
    student_NJ: Tensor, teacher_NJ: Tensor, tail_floor_nats: float
) -> tuple[Tensor, Tensor]:
    """`support_divergence` before its clamp; the last of the J columns is the tail."""
    dtype = compute_dtype(student_NJ, teacher_NJ)
    student_NJ, teacher_NJ = student_NJ.to(dtype, copy=True), teacher_NJ.to(dtype, copy=True)
    for side_NJ in (student_NJ, teacher_NJ):
        side_NJ[:, -1].clamp_(min=tail_floor_nats)
    student_p_NJ, teacher_p_NJ = student_NJ.exp(), teacher_NJ.exp()
    log_ratio_NJ = floor_impossible(student_NJ, tail_floor_nats) - floor_impossible(
        teacher_NJ, tail_floor_nats
    )
    return (student_p_NJ * log_ratio_NJ).sum(-1), -(teacher_p_NJ * log_ratio_NJ).sum(-1)


def floor_impossible(logprobs_NK: Tensor, floor_nats: float) -> Tensor:
    """-inf becomes `floor_nats`; finite values, however small, stay exact."""
    return logprobs_NK.masked_fill(logprobs_NK == _NEG_INF, floor_nats)


def entropy(logprobs_NV: Tensor) -> Tensor:
    """[N] entropy in nats of normalised log-probabilities; an impossible id adds 0."""
    finite_NV = logprobs_NV.clamp(min=torch.finfo(logprobs_NV.dtype).min)  # 0 * -inf is NaN
    return finite_NV.mul_(logprobs_NV.exp()).sum(-1).neg_().clamp_(min=0)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _relative_entropy(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """[N] sum of p (ln p - ln q) from log-probabilities; terms with p = 0 are 0."""
    mass_NV = p_NV.exp()
    return (mass_NV * (p_NV - q_NV)).masked_fill_(mass_NV == 0, 0.0).sum(-1)


def _jsd(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> Tensor:
    """[N] generalised Jensen-Shannon divergence of log-probabilities."""
    if beta == 0:
        return _relative_entropy(teacher_NV, student_NV)
    if beta == 1:
        return _relative_entropy(student_NV, teacher_NV)
    weights = teacher_NV.new_tensor([beta, 1 - beta])
    log_beta, log_rest = weights.log()
    mixture_NV = torch.logaddexp(teacher_NV + log_beta, student_NV + log_rest)
    forward_N = _relative_entropy(teacher_NV, mixture_NV)
    return weights[0] * forward_N + weights[1] * _relative_entropy(student_NV, mixture_NV)
