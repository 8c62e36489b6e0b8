"""Four ways to the same number: reverse KL on a support with its tail bucket, and its gradients.

N  rows        D  hidden size        V  rows of the head        K  ids of a row's support
C  rows of a chunk

    dense      logits of all rows, log_softmax, gather; autograd does the rest
    kept       logits of all rows are kept, the loss walks them chunk by chunk, and its backward
               writes their gradient over them
    recomputed each chunk of rows is checkpointed: its logits are made again for the backward
    ours       tip_ray.compute.loss.kept_loss

Each takes (hidden_ND, head_VD, targets, chunk rows) and answers a scalar, the sum of weight *
divergence, in float32. Only the student's side is ever [N, V]: the teacher's is a support already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tip_ray.compute.loss import kept_loss, kept_loss_with_stats


class Targets(NamedTuple):
    """The teacher's side of N rows."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor
    weight_N: Tensor

    def rows(self, which: Any) -> Targets:
        return Targets(*(one[which] for one in self))

    def double(self) -> Targets:
        return Targets(self.ids_NK, *(one.double() for one in self[1:]))


Loss = Callable[[Tensor, Tensor, Targets, int], Tensor]


def made_targets(rows: int, vocab_size: int, k: int, seed: int = 0) -> Targets:
    """Random distinct ids that hold about 95 % of the teacher's mass."""
    random = torch.Generator().manual_seed(seed)
    stride = vocab_size // k
    ids_NK = torch.randint(stride, (rows, k), generator=random) + torch.arange(k) * stride
    bucket_logits = torch.randn(rows, k + 1, generator=random) * 2
    logprobs = bucket_logits.log_softmax(-1)
    weight_N = torch.rand(rows, generator=random) / rows
    return Targets(ids_NK, logprobs[:, :k].contiguous(), logprobs[:, k].contiguous(), weight_N)


def dense(hidden_ND: Tensor, head_VD: Tensor, targets: Targets, chunk_rows: int) -> Tensor:
    return _plain(hidden_ND, head_VD, targets)


def recomputed(hidden_ND: Tensor, head_VD: Tensor, targets: Targets, chunk_rows: int) -> Tensor:
    total = hidden_ND.new_zeros(())
    for place, hidden_CD in enumerate(hidden_ND.split(chunk_rows)):
        rows = slice(place * chunk_rows, (place + 1) * chunk_rows)
        chunk = targets.rows(rows)
        total = total + checkpoint(_plain, hidden_CD, head_VD, chunk, use_reentrant=False)
    return total


def kept(hidden_ND: Tensor, head_VD: Tensor, targets: Targets, chunk_rows: int) -> Tensor:
    logits_NV = hidden_ND @ head_VD.T
    loss: Tensor = _KeptLogits.apply(logits_NV, targets, chunk_rows)
    return loss


def ours(hidden_ND: Tensor, head_VD: Tensor, targets: Targets, chunk_rows: int) -> Tensor:
    ids_NK, logprobs_NK, tail_N, weight_N = targets
    return kept_loss(
        hidden_ND,
        head_VD,
        ids_NK,
        logprobs_NK,
        weight_N,
        chunk_rows=chunk_rows,
        teacher_tail_logprob_N=tail_N,
    )


def ours_with_stats(
    hidden_ND: Tensor, head_VD: Tensor, targets: Targets, chunk_rows: int
) -> Tensor:
    """As the learner calls it: entropy and the sampled token's log-probability come along."""
    ids_NK, logprobs_NK, tail_N, weight_N = targets
    loss, _ = kept_loss_with_stats(
        hidden_ND,
        head_VD,
        ids_NK,
        logprobs_NK,
        weight_N,
        chunk_rows=chunk_rows,
        teacher_tail_logprob_N=tail_N,
        sampled_ids_N=ids_NK[:, 0],
    )
    return loss


LOSSES: dict[str, Loss] = {
    "dense": dense,
    "kept": kept,
    "recomputed": recomputed,
    "ours": ours,
    "ours, with statistics": ours_with_stats,
}


def largest_difference(rows: int, hidden_size: int, vocab_size: int, k: int) -> dict[str, float]:
    """By loss: the largest difference from float64, of value or gradient, relative to the largest.

    At the student's own top K, as in a run.
    """
    random = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(rows, hidden_size, generator=random)
    head_VD = torch.randn(vocab_size, hidden_size, generator=random) * 4 / hidden_size**0.5
    targets = made_targets(rows, vocab_size, k)
    targets = targets._replace(ids_NK=(hidden_ND @ head_VD.T).topk(k).indices)
    inputs = (hidden_ND.double(), head_VD.double())
    expected = _value_and_gradients(recomputed, *inputs, targets.double())
    found = {}
    for name, loss_of in LOSSES.items():
        values = _value_and_gradients(loss_of, hidden_ND, head_VD, targets)
        pairs = zip(values, expected, strict=True)
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return found


def _value_and_gradients(
    loss_of: Loss, hidden_ND: Tensor, head_VD: Tensor, targets: Targets
) -> list[Tensor]:
    leaves = (hidden_ND.detach().requires_grad_(), head_VD.detach().requires_grad_())
    loss = loss_of(*leaves, targets, 128)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _plain(hidden_CD: Tensor, head_VD: Tensor, targets: Targets) -> Tensor:
    logprobs_CV = (hidden_CD @ head_VD.T).log_softmax(-1)
    return _weighed(logprobs_CV.gather(1, targets.ids_NK), targets)


def _weighed(student_CK: Tensor, targets: Targets) -> Tensor:
    mass_CK = student_CK.exp()
    tail_C = torch.log1p(-mass_CK.sum(-1).clamp(max=1 - 1e-7))
    value_C = (mass_CK * (student_CK - targets.logprobs_NK)).sum(-1)
    value_C = value_C + tail_C.exp() * (tail_C - targets.tail_N)
    return (value_C * targets.weight_N).sum()


class _KeptLogits(torch.autograd.Function):
    """The loss of given logits [N, V]; its backward turns them into their own gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets: Targets, chunk_rows: int) -> Tensor:
        total = logits_NV.new_zeros(())
        log_normalizers, by_logprob = [], []
        for start in range(0, len(logits_NV), chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk = targets.rows(rows)
            log_normalizer_C1 = logits_NV[rows].logsumexp(-1, keepdim=True)
            student_CK = logits_NV[rows].gather(1, chunk.ids_NK) - log_normalizer_C1
            with torch.enable_grad():
                loss = _weighed(student_CK.requires_grad_(), chunk)
            by_logprob.append(torch.autograd.grad(loss, student_CK)[0])
            log_normalizers.append(log_normalizer_C1)
            total += loss.detach()
        ctx.save_for_backward(logits_NV, torch.cat(log_normalizers), torch.cat(by_logprob))
        ctx.ids_NK, ctx.chunk_rows = targets.ids_NK, chunk_rows
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, log_normalizer_N1, by_logprob_NK = ctx.saved_tensors
        for start in range(0, len(logits_NV), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            by_logprob_CK = by_logprob_NK[rows] * grad
            grad_CV = logits_NV[rows].sub_(log_normalizer_N1[rows]).exp_()
            grad_CV.mul_(-by_logprob_CK.sum(-1, keepdim=True))
            grad_CV.scatter_add_(1, ctx.ids_NK[rows], by_logprob_CK)
        return logits_NV, None, None
