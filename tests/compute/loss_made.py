"""Kept tokens with everything that the loss reads."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.compute import dense_reference as dense
from tip_ray.compute.divergence import tail_logprob
from tip_ray.compute.loss import kept_loss

NEG_INF = float("-inf")
F64 = torch.float64


class Problem:
    """Rows of hidden states, a head, and a teacher on a random support."""

    def __init__(self, seed=0, n=7, d=5, v=12, k=4, sharpness=2.0, dtype=F64):
        random = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(n, d, generator=random, dtype=F64).to(dtype).requires_grad_()
        self.head = torch.randn(v, d, generator=random, dtype=F64).to(dtype).requires_grad_()
        logits = torch.randn(n, v, generator=random, dtype=F64) * sharpness
        self.teacher = logits.log_softmax(-1)
        order = torch.rand(n, v, generator=random).argsort(-1)
        self.ids = order[:, :k]
        self.weight = torch.rand(n, generator=random, dtype=F64)
        self.sampled = order[:, -1]

    def pad(self, share, seed=0):
        hide = torch.rand(self.ids.shape, generator=torch.Generator().manual_seed(seed)) < share
        self.ids = self.ids.masked_fill(hide, -1)
        return self

    @property
    def logprobs(self):
        return self.teacher.gather(1, self.ids.clamp(min=0)).masked_fill(self.ids < 0, NEG_INF)

    @property
    def tail(self):
        return tail_logprob(self.teacher, self.ids)

    def arguments(self):
        return self.hidden, self.head, self.ids, self.logprobs, self.weight

    def loss(self, **options):
        return kept_loss(*self.arguments(), teacher_tail_logprob_N=self.tail, **options)

    def reference(self, floor=-30.0, **kind):
        return dense.kept_loss(
            self.hidden, self.head, self.ids, self.logprobs, self.tail, self.weight, floor, **kind
        )

    def grads(self, loss):
        return torch.autograd.grad(loss, (self.hidden, self.head), retain_graph=True)


def assert_same(problem, found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)
    for a, b in zip(problem.grads(found), problem.grads(expected), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


class Sizes(TorchDispatchMode):
    """The sizes of every tensor that an operation returns, in (elements, dtype)."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.seen |= {(leaf.numel(), leaf.dtype) for leaf in leaves}
        return result
