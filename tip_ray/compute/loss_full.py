"""A kept token's loss on the whole vocabulary, from the teacher's hidden state and head.

C  rows of a chunk    V  shared vocabulary    N  kept tokens    E  hidden size of the teacher

Each kind takes both sides' log-probabilities and answers the value and its gradient by the
student's logits. It works in the buffers it is given, so that a chunk needs one or two more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tip_ray.compute.loss_head import Head
from tip_ray.compute.loss_kinds import NEG_INF, Options

FullKind = Callable[[Tensor, Tensor, Options], tuple[Tensor, Tensor]]


class HiddenTeacher(NamedTuple):
    """A `TeacherSide` of which every kept token's hidden state is known."""

    hidden_NE: Tensor
    head_VE: Tensor
    options: Options

    def divergence_(
        self, logprobs_CV: Tensor, rows: slice, weight_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `TeacherSide`."""
        dtype = logprobs_CV.dtype
        head = Head(self.head_VE, None, self.options.vocab_size, dtype)
        teacher_CV = head.logits(self.hidden_NE[rows].to(dtype)).log_softmax(-1)
        value_C, grad_CV = FULL_KINDS[self.options.kind](logprobs_CV, teacher_CV, self.options)
        return value_C, grad_CV.mul_(weight_C[:, None])


def reverse_kl_(student_CV: Tensor, teacher_CV: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """KL(S||T): sum of p_S (ln p_S - ln p_T) and p_S (ln p_S - ln p_T - KL)."""
    mass_CV = student_CV.exp()
    for side_CV in (student_CV, teacher_CV):
        _floor_impossible_(side_CV, options.tail_floor_nats)
    log_ratio_CV = student_CV.sub_(teacher_CV)
    value_C = torch.mul(mass_CV, log_ratio_CV, out=teacher_CV).sum(-1)
    return value_C, log_ratio_CV.sub_(value_C[:, None]).mul_(mass_CV)


def forward_kl_(student_CV: Tensor, teacher_CV: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """KL(T||S): sum of p_T (ln p_T - ln p_S) and p_S - p_T."""
    mass_CV = teacher_CV.exp()
    impossible_CV = student_CV == NEG_INF
    for side_CV in (student_CV, teacher_CV):
        _floor_impossible_(side_CV, options.tail_floor_nats)
    value_C = teacher_CV.sub_(student_CV).mul_(mass_CV).sum(-1)
    return value_C, student_CV.exp_().masked_fill_(impossible_CV, 0.0).sub_(mass_CV)


def jsd_(student_CV: Tensor, teacher_CV: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """beta KL(T||M) + (1 - beta) KL(S||M), M = beta T + (1 - beta) S; beta 0 and 1 are the KLs."""
    beta = options.beta
    if beta in (0.0, 1.0):
        limit = forward_kl_ if beta == 0.0 else reverse_kl_
        return limit(student_CV, teacher_CV, options)
    log_m_CV = teacher_CV + math.log(beta)
    torch.logaddexp(log_m_CV, student_CV + math.log1p(-beta), out=log_m_CV)
    of_teacher_CV, _ = _mass_times_log_ratio_(teacher_CV, log_m_CV)
    by_logprob_CV, mass_CV = _mass_times_log_ratio_(student_CV, log_m_CV)
    total_C = by_logprob_CV.mul_(1 - beta).sum(-1)
    value_C = beta * of_teacher_CV.sum(-1) + total_C
    return value_C, by_logprob_CV.sub_(mass_CV.mul_(total_C[:, None]))


def _mass_times_log_ratio_(logprob_CV: Tensor, log_m_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(p ln(p / m), p), the first in place; an id without mass adds 0."""
    mass_CV = logprob_CV.exp()
    return logprob_CV.sub_(log_m_CV).mul_(mass_CV).masked_fill_(mass_CV == 0, 0.0), mass_CV


def _floor_impossible_(logprobs_CV: Tensor, floor_nats: float) -> None:
    """As `divergence.floor_impossible`, in place."""
    logprobs_CV.masked_fill_(logprobs_CV == NEG_INF, floor_nats)


FULL_KINDS: dict[str, FullKind] = {
    "reverse_kl": reverse_kl_,
    "forward_kl": forward_kl_,
    "jsd": jsd_,
}
