"""The fused head and loss as one autograd function, chunk by chunk: never [N, V] at once.

N  kept tokens    D  hidden size    V  rows of the head    C  rows of a chunk

The gradients are computed in the forward, while a chunk's logits are alive; what waits for the
backward is [N, D] and [V, D].
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tip_ray.compute.divergence import compute_dtype, entropy
from tip_ray.compute.loss_head import Head
from tip_ray.compute.loss_kinds import Options

_ENTROPY_ROWS = 64  # at once: entropy needs two more buffers of as many rows


class TeacherSide(Protocol):
    """What the student is compared with; knows how, too."""

    def divergence_(
        self, logprobs_CV: Tensor, rows: slice, weight_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([C] divergence, [C, V] gradient of weight * divergence by the student's logits).

        `rows` are the chunk's. Eats the student's log-probabilities.
        """
        ...


def run(
    hidden_ND: Tensor,
    lm_head_VD: Tensor,
    teacher: TeacherSide,
    weight_N: Tensor,
    sampled_ids_N: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    """(loss,), or with `sampled_ids_N` (loss, divergence_N, sampled_logprob_N, entropy_N)."""
    outputs: tuple[Tensor, ...] = _KeptLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, lm_head_VD, teacher, weight_N, sampled_ids_N, options
    )
    return outputs


class _KeptLoss(torch.autograd.Function):
    """`run`; the loss alone carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        lm_head_VD: Tensor,
        teacher: TeacherSide,
        weight_N: Tensor,
        sampled_ids_N: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, ...]:
        dtype = compute_dtype(hidden_ND, lm_head_VD)
        need_hidden, need_head = (options.with_grad and need for need in ctx.needs_input_grad[:2])
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype) if need_hidden else None
        grad_head_VD = torch.zeros_like(lm_head_VD, dtype=dtype) if need_head else None
        head = Head(lm_head_VD, grad_head_VD, options.vocab_size, dtype)
        stats_SN = hidden_ND.new_zeros((3, len(hidden_ND)), dtype=dtype)
        for start in range(0, len(hidden_ND), options.chunk_rows):
            rows = slice(start, start + options.chunk_rows)
            hidden_CD = hidden_ND[rows].to(dtype)
            logprobs_CV = head.logits(hidden_CD).log_softmax(-1)
            if sampled_ids_N is not None:
                stats_SN[1, rows] = logprobs_CV.gather(1, sampled_ids_N[rows, None]).squeeze(1)
                parts = (entropy(part) for part in torch.split(logprobs_CV, _ENTROPY_ROWS))
                stats_SN[2, rows] = torch.cat(list(parts))
            stats_SN[0, rows], grad_CV = teacher.divergence_(
                logprobs_CV, rows, weight_N[rows].to(dtype)
            )
            head.add_grad(grad_CV, hidden_CD)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = head.grad_hidden(grad_CV)
            del logprobs_CV, grad_CV  # or they would lie beside the next chunk's
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
