"""What a kept token's loss is on its support, and how it pulls at the student's distribution.

C  rows of a chunk        K  ids of a token's support; -1 = padding, -inf on both sides
V  shared vocabulary

Each kind sees the student's log-probabilities on the support and of the tail bucket, and answers
the value and its derivative by each of those log-probabilities. By those and not by masses: a
teacher's tail above a student's would make the latter e^30, which float32 cannot take back out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tip_ray.compute.divergence import drop_ids_, floor_impossible

NEG_INF = float("-inf")


class Support(NamedTuple):
    """The teacher's side of some rows."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor
    recorded_N: Tensor | None  # the student's log-probability of the token when it was drawn

    def chunk(self, rows: slice, dtype: torch.dtype) -> Support:
        """Some rows in `dtype`, whatever stood at padding made -inf."""
        ids_CK = self.ids_NK[rows]
        logprobs_CK = self.logprobs_NK[rows].to(dtype).masked_fill(ids_CK < 0, NEG_INF)
        recorded_C = None if self.recorded_N is None else self.recorded_N[rows].to(dtype)
        return Support(ids_CK, logprobs_CK, self.tail_N[rows].to(dtype), recorded_C)


class Options(NamedTuple):
    """What does not change from row to row."""

    kind: str
    chunk_rows: int
    beta: float
    clip: float
    tail_floor_nats: float
    vocab_size: int
    with_grad: bool


class Pull(NamedTuple):
    """A loss of rows and how it changes with the student's coarse distribution."""

    value_C: Tensor
    by_logprob_CK: Tensor  # d value / d ln p of each support id
    by_tail_C: Tensor  # d value / d ln r, r the mass of the tail


Kind = Callable[[Tensor, Tensor, Support, Options], Pull]


def reverse_kl(student_CK: Tensor, tail_C: Tensor, teacher: Support, options: Options) -> Pull:
    """KL(S||T): sum of p_S (ln p_S - ln p_T), the tail included."""
    floor_nats = options.tail_floor_nats
    log_ratio_CK = floor_impossible(student_CK, floor_nats) - floor_impossible(
        teacher.logprobs_NK, floor_nats
    )
    floored_C = tail_C.clamp(min=floor_nats)
    log_ratio_C = floored_C - teacher.tail_N.clamp(min=floor_nats)
    mass_CK, mass_C = student_CK.exp(), floored_C.exp()
    value_C = (mass_CK * log_ratio_CK).sum(-1) + mass_C * log_ratio_C
    by_tail_C = _above_floor(mass_C * (log_ratio_C + 1), tail_C, floor_nats)
    return Pull(value_C, mass_CK * (log_ratio_CK + 1), by_tail_C)


def forward_kl(student_CK: Tensor, tail_C: Tensor, teacher: Support, options: Options) -> Pull:
    """KL(T||S): sum of p_T (ln p_T - ln p_S), the tail included."""
    floor_nats = options.tail_floor_nats
    log_ratio_CK = floor_impossible(teacher.logprobs_NK, floor_nats) - floor_impossible(
        student_CK, floor_nats
    )
    teacher_tail_C = teacher.tail_N.clamp(min=floor_nats)
    log_ratio_C = teacher_tail_C - tail_C.clamp(min=floor_nats)
    mass_CK, mass_C = teacher.logprobs_NK.exp(), teacher_tail_C.exp()
    value_C = (mass_CK * log_ratio_CK).sum(-1) + mass_C * log_ratio_C
    return Pull(value_C, -mass_CK, _above_floor(-mass_C, tail_C, floor_nats))


def jsd(student_CK: Tensor, tail_C: Tensor, teacher: Support, options: Options) -> Pull:
    """beta KL(T||M) + (1 - beta) KL(S||M), M = beta T + (1 - beta) S; beta 0 and 1 are the KLs."""
    if options.beta in (0.0, 1.0):
        limit = forward_kl if options.beta == 0.0 else reverse_kl
        return limit(student_CK, tail_C, teacher, options)
    floor_nats = options.tail_floor_nats
    teacher_tail_C = teacher.tail_N.clamp(min=floor_nats)
    value_CK, by_CK = _jsd_terms(student_CK, teacher.logprobs_NK, options.beta)
    value_C, by_C = _jsd_terms(tail_C.clamp(min=floor_nats), teacher_tail_C, options.beta)
    return Pull(value_CK.sum(-1) + value_C, by_CK, _above_floor(by_C, tail_C, floor_nats))


def _jsd_terms(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Each bucket's term, and its derivative by ln p_S: (1 - beta) p_S ln(p_S / m)."""
    log_m = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher, of_student = (_mass_times_log_ratio(one, log_m) for one in (teacher, student))
    by_logprob = (1 - beta) * of_student
    return beta * of_teacher + by_logprob, by_logprob


def _mass_times_log_ratio(logprob: Tensor, log_m: Tensor) -> Tensor:
    return (logprob.exp() * (logprob - log_m)).masked_fill(logprob == NEG_INF, 0.0)


def policy_gradient(student_C1: Tensor, tail_C: Tensor, teacher: Support, options: Options) -> Pull:
    """-min(r A, clip(r) A) of the sampled token: A = ln p_T - ln p_old, r = p_S / p_old.

    At r = 1 its expected gradient is that of KL(S||T): E[(ln p_S - ln p_T) d ln p_S].
    """
    if teacher.recorded_N is None:
        raise ValueError("policy_gradient without recorded log-probabilities")  # see kept_loss
    teacher_C1 = floor_impossible(teacher.logprobs_NK, options.tail_floor_nats)
    advantage_C1 = teacher_C1 - teacher.recorded_N[:, None]
    ratio_C1 = (student_C1 - teacher.recorded_N[:, None]).exp()
    clipped_C1 = ratio_C1.clamp(1 - options.clip, 1 + options.clip)
    free_C1 = ratio_C1 * advantage_C1 <= clipped_C1 * advantage_C1
    surrogate_C1 = torch.where(free_C1, ratio_C1, clipped_C1) * advantage_C1
    by_logprob_C1 = (-ratio_C1 * advantage_C1).masked_fill(~free_C1, 0.0)
    return Pull(-surrogate_C1.squeeze(1), by_logprob_C1, torch.zeros_like(tail_C))


def _above_floor(by_tail_C: Tensor, tail_C: Tensor, floor_nats: float) -> Tensor:
    """A floored tail is a constant."""
    return by_tail_C.masked_fill(tail_C <= floor_nats, 0.0)


KINDS: dict[str, Kind] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "policy_gradient": policy_gradient,
}


class SupportTeacher(NamedTuple):
    """A `TeacherSide` that is known on supports and their tails."""

    support: Support
    options: Options

    def divergence_(
        self, logprobs_CV: Tensor, rows: slice, weight_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `TeacherSide`."""
        teacher = self.support.chunk(rows, logprobs_CV.dtype)
        student_CK = logprobs_CV.gather(1, teacher.ids_NK.clamp(min=0))
        student_CK.masked_fill_(teacher.ids_NK < 0, NEG_INF)
        tail_C = drop_ids_(logprobs_CV, teacher.ids_NK).logsumexp(-1)
        pull = KINDS[self.options.kind](student_CK, tail_C, teacher, self.options)
        # Through the softmax: d/dz_j = g_j - p_j sum(g). On the support g_j is the pull by ln p_j;
        # an id of the tail takes its share p_j / r of the pull by ln r.
        total_C = pull.by_logprob_CK.sum(-1) + pull.by_tail_C
        finite_C = tail_C.clamp(min=torch.finfo(tail_C.dtype).min)  # an empty tail has no shares
        grad_CV = logprobs_CV.sub_(finite_C[:, None]).exp_()
        grad_CV.mul_((weight_C * (pull.by_tail_C - tail_C.exp() * total_C))[:, None])
        on_support_CK = pull.by_logprob_CK - student_CK.exp() * total_C[:, None]
        grad_CV.scatter_add_(1, teacher.ids_NK.clamp(min=0), on_support_CK * weight_C[:, None])
        return pull.value_C, grad_CV
