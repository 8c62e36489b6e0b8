"""LM head and divergence on the kept rows only, fused and chunked: never [N, V] at once.

N  kept tokens        D  hidden size        V  rows of the head        K  ids of a token's support
E  hidden size of the teacher               C  rows of a chunk

`kept_loss` knows the teacher on a support, `hidden_loss` on the whole vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tip_ray.compute import loss_checks as checks
from tip_ray.compute.loss_function import run


class KeptStats(NamedTuple):
    """One value a kept token, in nats; no gradient."""

    divergence_N: Tensor  # what the loss weighs
    sampled_logprob_N: Tensor  # the learner's, of the sampled token
    entropy_N: Tensor  # the learner's


def kept_loss(
    hidden_ND: Tensor,
    lm_head_VD: Tensor,
    support_ids_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    weight_N: Tensor,
    kind: str = "reverse_kl",
    chunk_rows: int = 512,
    *,
    teacher_tail_logprob_N: Tensor | None = None,
    student_logprob_N: Tensor | None = None,
    beta: float = 0.5,
    clip: float = 0.2,
    tail_floor_nats: float = -30.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Sum over rows of weight * divergence on the support with its tail bucket, a scalar in nats.

    reverse_kl: sum over U of p_S (ln p_S - ln p_T), plus r_S (ln r_S - ln r_T) of the masses
    outside; forward_kl: the same with S and T exchanged; jsd: beta KL(T||M) + (1 - beta) KL(S||M)
    with M = beta T + (1 - beta) S, at beta 0 and 1 the two KLs. Both tails are floored at
    `tail_floor_nats` (no gradient below it; the term is 0 at U = V); without
    `teacher_tail_logprob_N` it is ln(1 - sum exp) of what is given, in float64. Id -1 is padding
    (any other id of a row twice counts twice); in a KL an id that one side rules out (-inf) counts
    there as `tail_floor_nats`.

    policy_gradient: the support is the sampled token alone (K = 1), `student_logprob_N` what it
    was drawn with; the sampled reverse KL is the advantage, its importance ratio clipped at
    1 +- `clip`.

    Differentiable in `hidden_ND` and `lm_head_VD`, once. Float32 inside (float64 stays float64),
    whatever the inputs; two [chunk_rows, V] buffers. Head rows from `vocab_size` on (default:
    none) are outside of the vocabulary. N = 0 gives 0, still a part of the graph.

    Raises:
        SpecError: `kind` is unknown, an option is out of range, shapes do not fit together, or a
            support id is outside of the vocabulary.
        DataError: a weight or a log-probability is NaN or infinite (-inf may be the teacher's);
            names the first. Hidden states and head are not looked at: theirs end in the loss.
    """
    options = checks.checked_options(
        len(lm_head_VD), kind, chunk_rows, beta, tail_floor_nats, vocab_size, clip
    )
    support = (support_ids_NK, teacher_logprobs_NK, teacher_tail_logprob_N, student_logprob_N)
    teacher = checks.support_teacher(hidden_ND, lm_head_VD, *support, options, weight_N=weight_N)
    checks.check_values(teacher, weight_N)
    return run(hidden_ND, lm_head_VD, teacher, weight_N, None, options)[0]


def kept_loss_with_stats(
    hidden_ND: Tensor,
    lm_head_VD: Tensor,
    support_ids_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    weight_N: Tensor,
    kind: str = "reverse_kl",
    chunk_rows: int = 512,
    *,
    sampled_ids_N: Tensor,
    teacher_tail_logprob_N: Tensor | None = None,
    student_logprob_N: Tensor | None = None,
    beta: float = 0.5,
    clip: float = 0.2,
    tail_floor_nats: float = -30.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, KeptStats]:
    """(`kept_loss`, KeptStats) in one pass; `sampled_ids_N` are the kept tokens themselves.

    For training on several ranks, which must not part: NaN and infinities are not refused here,
    they end in the loss, and the update is skipped on all.
    """
    options = checks.checked_options(
        len(lm_head_VD), kind, chunk_rows, beta, tail_floor_nats, vocab_size, clip
    )
    support = (support_ids_NK, teacher_logprobs_NK, teacher_tail_logprob_N, student_logprob_N)
    per_token = {"weight_N": weight_N, "sampled_ids_N": sampled_ids_N}
    teacher = checks.support_teacher(hidden_ND, lm_head_VD, *support, options, **per_token)
    loss, *stats = run(hidden_ND, lm_head_VD, teacher, weight_N, sampled_ids_N, options)
    return loss, KeptStats(*stats)


def hidden_loss(
    hidden_ND: Tensor,
    lm_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    weight_N: Tensor,
    kind: str = "reverse_kl",
    chunk_rows: int = 512,
    *,
    beta: float = 0.5,
    tail_floor_nats: float = -30.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Sum over rows of weight * divergence on the whole vocabulary, a scalar in nats.

    As `kept_loss` with every id in the support, for reverse_kl, forward_kl and jsd: S is the
    softmax of hidden @ lm_head, T that of teacher_hidden @ teacher_head, both over the first
    `vocab_size` rows (default: of the smaller head). The teacher may be wider than the student.
    An id that one side rules out (-inf) counts in a KL as `tail_floor_nats`.

    Differentiable in `hidden_ND` and `lm_head_VD`, once; nothing flows into the teacher. Float32
    inside (float64 stays float64), whatever the inputs; at most four [chunk_rows, V] buffers.
    N = 0 gives 0, still a part of the graph.

    Raises:
        SpecError: `kind` is unknown or policy_gradient, an option is out of range, or shapes do
            not fit together.
        DataError: a weight or a teacher's hidden state is NaN or infinite; names the first.
    """
    rows = min(len(lm_head_VD), len(teacher_head_VE))
    options = checks.checked_options(rows, kind, chunk_rows, beta, tail_floor_nats, vocab_size)
    sides = (hidden_ND, lm_head_VD, teacher_hidden_NE, teacher_head_VE)
    teacher = checks.hidden_teacher(*sides, options, weight_N=weight_N)
    checks.check_values(teacher, weight_N)
    return run(hidden_ND, lm_head_VD, teacher, weight_N, None, options)[0]


def hidden_loss_with_stats(
    hidden_ND: Tensor,
    lm_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    weight_N: Tensor,
    kind: str = "reverse_kl",
    chunk_rows: int = 512,
    *,
    sampled_ids_N: Tensor,
    beta: float = 0.5,
    tail_floor_nats: float = -30.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, KeptStats]:
    """(`hidden_loss`, KeptStats) in one pass, with `sampled_ids_N` and NaN as in
    `kept_loss_with_stats`."""
    rows = min(len(lm_head_VD), len(teacher_head_VE))
    options = checks.checked_options(rows, kind, chunk_rows, beta, tail_floor_nats, vocab_size)
    sides = (hidden_ND, lm_head_VD, teacher_hidden_NE, teacher_head_VE)
    per_token = {"weight_N": weight_N, "sampled_ids_N": sampled_ids_N}
    teacher = checks.hidden_teacher(*sides, options, **per_token)
    loss, *stats = run(hidden_ND, lm_head_VD, teacher, weight_N, sampled_ids_N, options)
    return loss, KeptStats(*stats)
