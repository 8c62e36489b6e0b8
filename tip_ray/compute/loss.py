"""LM head and divergence on the kept rows only, fused and chunked: never [N, V] at once.

N  kept tokens        D  hidden size        V  rows of the head        K  ids of a token's support
C  rows of a chunk

The gradients are computed in the forward, chunk by chunk, while a chunk's logits are alive; what
waits for the backward is [N, D] and [V, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tip_ray.compute.divergence import compute_dtype, drop_ids_, entropy
from tip_ray.compute.loss_kinds import KINDS, NEG_INF, Options, Support
from tip_ray.contract.errors import DataError, SpecError

_CAST_ELEMENTS = 1 << 24  # of the head alive in the compute dtype at once, where it is narrower


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
    whatever the inputs; three [chunk_rows, V] buffers. Head rows from `vocab_size` on (default:
    none) are outside of the vocabulary. N = 0 gives 0, still a part of the graph.

    Raises:
        SpecError: `kind` is unknown, an option is out of range, shapes do not fit together, or a
            support id is outside of the vocabulary.
        DataError: a weight or a log-probability is NaN or infinite (-inf may be the teacher's);
            names the first. Hidden states and head are not looked at: theirs end in the loss.
    """
    options = _options(lm_head_VD, kind, chunk_rows, beta, clip, tail_floor_nats, vocab_size)
    support = (support_ids_NK, teacher_logprobs_NK, teacher_tail_logprob_N, student_logprob_N)
    teacher = _teacher(hidden_ND, lm_head_VD, *support, options, weight_N=weight_N)
    _check_values(teacher, weight_N)
    return _run(hidden_ND, lm_head_VD, teacher, weight_N, None, options)[0]


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
    options = _options(lm_head_VD, kind, chunk_rows, beta, clip, tail_floor_nats, vocab_size)
    support = (support_ids_NK, teacher_logprobs_NK, teacher_tail_logprob_N, student_logprob_N)
    per_token = {"weight_N": weight_N, "sampled_ids_N": sampled_ids_N}
    teacher = _teacher(hidden_ND, lm_head_VD, *support, options, **per_token)
    loss, *stats = _run(hidden_ND, lm_head_VD, teacher, weight_N, sampled_ids_N, options)
    return loss, KeptStats(*stats)


class _KeptLoss(torch.autograd.Function):
    """(loss, *KeptStats); the loss alone carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        lm_head_VD: Tensor,
        teacher: Support,
        weight_N: Tensor,
        sampled_ids_N: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, ...]:
        dtype = compute_dtype(hidden_ND, lm_head_VD)
        need_hidden, need_head = (options.with_grad and need for need in ctx.needs_input_grad[:2])
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype) if need_hidden else None
        grad_head_VD = torch.zeros_like(lm_head_VD, dtype=dtype) if need_head else None
        head = _Head(lm_head_VD, grad_head_VD, options.vocab_size, dtype)
        stats_SN = hidden_ND.new_zeros((3, len(hidden_ND)), dtype=dtype)
        for start in range(0, len(hidden_ND), options.chunk_rows):
            rows = slice(start, start + options.chunk_rows)
            hidden_CD = hidden_ND[rows].to(dtype)
            logprobs_CV = head.logits(hidden_CD).log_softmax(-1)
            if sampled_ids_N is not None:
                stats_SN[1, rows] = logprobs_CV.gather(1, sampled_ids_N[rows, None]).squeeze(1)
                stats_SN[2, rows] = entropy(logprobs_CV)
            stats_SN[0, rows], grad_CV = _divergence_(
                logprobs_CV, teacher.chunk(rows, dtype), weight_N[rows].to(dtype), options
            )
            head.add_grad(grad_CV, hidden_CD)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = head.grad_hidden(grad_CV)
        loss = (stats_SN[0] * weight_N.to(dtype)).sum()
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        ctx.dtypes = (hidden_ND.dtype, lm_head_VD.dtype)
        if sampled_ids_N is None:
            return (loss,)
        ctx.mark_non_differentiable(*(stats := stats_SN.unbind()))
        return (loss, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else torch.mul(grad, grads[0], out=grad.new_empty(0, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _KeptLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return outputs


def _divergence_(
    logprobs_CV: Tensor, teacher: Support, weight_C: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """([C] divergence, [C, V] gradient of weight * divergence by the logits); eats its input."""
    student_CK = logprobs_CV.gather(1, teacher.ids_NK.clamp(min=0))
    student_CK.masked_fill_(teacher.ids_NK < 0, NEG_INF)
    tail_C = drop_ids_(logprobs_CV, teacher.ids_NK).logsumexp(-1)
    pull = KINDS[options.kind](student_CK, tail_C, teacher, options)
    # Through the softmax: d/dz_j = g_j - p_j sum(g). On the support g_j is the pull by ln p_j; an
    # id of the tail takes its share p_j / r of the pull by ln r.
    total_C = pull.by_logprob_CK.sum(-1) + pull.by_tail_C
    finite_C = tail_C.clamp(min=torch.finfo(tail_C.dtype).min)  # an empty tail has no shares
    grad_CV = logprobs_CV.sub_(finite_C[:, None]).exp_()
    grad_CV.mul_((weight_C * (pull.by_tail_C - tail_C.exp() * total_C))[:, None])
    on_support_CK = pull.by_logprob_CK - student_CK.exp() * total_C[:, None]
    grad_CV.scatter_add_(1, teacher.ids_NK.clamp(min=0), on_support_CK * weight_C[:, None])
    return pull.value_C, grad_CV


class _Head(NamedTuple):
    """The head's products; a narrower one is cast block by block, never as a whole.

    All write into given tensors, which also keeps an autocast around the loss from narrowing them.
    """

    weight_VD: Tensor
    grad_VD: Tensor | None
    vocab_size: int
    dtype: torch.dtype

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        step = self.vocab_size
        if self.weight_VD.dtype != self.dtype:
            step = max(_CAST_ELEMENTS // self.weight_VD.shape[1], 1)
        for start in range(0, self.vocab_size, step):
            rows = slice(start, min(start + step, self.vocab_size))
            yield rows, self.weight_VD[rows].to(self.dtype)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        logits_CV = hidden_CD.new_empty(len(hidden_CD), self.vocab_size)
        for rows, block_BD in self._blocks():
            torch.mm(hidden_CD, block_BD.T, out=logits_CV[:, rows])
        return logits_CV

    def grad_hidden(self, grad_CV: Tensor) -> Tensor:
        grad_CD = grad_CV.new_zeros(len(grad_CV), self.weight_VD.shape[1])
        for rows, block_BD in self._blocks():
            grad_CD.addmm_(grad_CV[:, rows], block_BD)
        return grad_CD

    def add_grad(self, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        if self.grad_VD is not None:
            self.grad_VD[: self.vocab_size].addmm_(grad_CV.T, hidden_CD)


def _teacher(
    hidden_ND: Tensor,
    lm_head_VD: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    recorded_N: Tensor | None,
    options: Options,
    **per_token: Tensor,
) -> Support:
    """The teacher's side, once everything fits together; `per_token` is checked along with it."""
    columns = {"teacher_tail_logprob_N": tail_N, "student_logprob_N": recorded_N, **per_token}
    n, width = len(hidden_ND), ids_NK.shape[-1]
    for name, tensor, shape in (
        ("lm_head_VD", lm_head_VD, (len(lm_head_VD), hidden_ND.shape[-1])),
        ("hidden_ND", hidden_ND, (n, lm_head_VD.shape[-1])),
        ("support_ids_NK", ids_NK, (n, width)),
        ("teacher_logprobs_NK", logprobs_NK, (n, width)),
        *((name, one, (n,)) for name, one in columns.items()),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise SpecError(name, f"shape {tuple(tensor.shape)}", f"{shape}, as its fellows")
    if options.kind == "policy_gradient" and (recorded_N is None or width != 1):
        found = "no student_logprob_N" if recorded_N is None else f"K = {width}"
        raise SpecError("loss.kind policy_gradient", found, "K = 1 and what it was drawn with")
    ids_NK = _checked_ids(ids_NK, options.vocab_size)
    if tail_N is None:
        real_NK = ids_NK >= 0
        mass_N = logprobs_NK.double().exp().masked_fill(~real_NK, 0.0).sum(-1)
        tail_N = torch.log1p(-mass_N.clamp(max=1.0))
        tail_N = tail_N.masked_fill(real_NK.sum(-1) == options.vocab_size, NEG_INF)
    return Support(ids_NK, logprobs_NK, tail_N, recorded_N)


def _checked_ids(ids_NK: Tensor, vocab_size: int) -> Tensor:
    """int64, each -1 or in the vocabulary."""
    if ids_NK.is_floating_point() or ids_NK.dtype == torch.bool:
        raise SpecError("support_ids_NK", str(ids_NK.dtype), "whole numbers")
    if ids_NK.numel():
        low, high = (int(one) for one in torch.stack(ids_NK.aminmax()).tolist())
        if low < -1 or high >= vocab_size:
            found = f"id {low if low < -1 else high}"
            raise SpecError("support_ids_NK", found, f"ids below {vocab_size}, or -1 for padding")
    return ids_NK.long()


def _check_values(teacher: Support, weight_N: Tensor) -> None:
    """What would end as a NaN that nobody can place."""
    impossible_NK = (teacher.logprobs_NK == NEG_INF) | (teacher.ids_NK < 0)
    named = {
        "weight_N": weight_N.isfinite(),
        "teacher_logprobs_NK": (teacher.logprobs_NK.isfinite() | impossible_NK).all(-1),
        "teacher_tail_logprob_N": teacher.tail_N.isfinite() | (teacher.tail_N == NEG_INF),
    }
    if teacher.recorded_N is not None:
        named["student_logprob_N"] = teacher.recorded_N.isfinite()
    for name, fine_N in named.items():
        if not fine_N.all():
            row = int(fine_N.int().argmin())
            raise DataError(f"{name}: found NaN or an infinity in row {row}, expected numbers")


def _options(
    lm_head_VD: Tensor,
    kind: str,
    chunk_rows: int,
    beta: float,
    clip: float,
    tail_floor_nats: float,
    vocab_size: int | None,
) -> Options:
    rows = len(lm_head_VD)
    vocab_size = rows if vocab_size is None else vocab_size
    if kind not in KINDS:
        raise SpecError("loss.kind", repr(kind), " | ".join(KINDS))
    for name, value, fits, expected in (
        ("chunk_rows", chunk_rows, chunk_rows >= 1, "at least 1"),
        ("loss.beta", beta, 0 <= beta <= 1, "a number from 0 to 1"),
        ("loss.clip", clip, 0 < clip < 1, "a number between 0 and 1"),
        ("tail_floor_nats", tail_floor_nats, NEG_INF < tail_floor_nats < 0, "a number below 0"),
        ("vocab_size", vocab_size, 1 <= vocab_size <= rows, f"1 to the head's {rows} rows"),
    ):
        if not fits:
            raise SpecError(name, str(value), expected)
    with_grad = torch.is_grad_enabled()
    return Options(kind, chunk_rows, beta, clip, tail_floor_nats, vocab_size, with_grad)
