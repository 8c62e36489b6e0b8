"""Plain float64 references, token by token, written from the formulas and not from the code."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch

NEG_INF = float("-inf")


def kl(p: list[float], q: list[float]) -> float:
    """Sum of p ln(p/q) with 0 ln 0 = 0."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total += math.inf if b == 0 else a * (math.log(a) - math.log(b))
    return total


def probabilities(logits) -> list[float]:
    values = [float(x) for x in logits]
    top = max(values)
    weights = [math.exp(x - top) for x in values]
    total = math.fsum(weights)
    return [w / total for w in weights]


def coarse(p: list[float], ids: list[int]) -> list[float]:
    """p on `ids` (padding left out), the rest as one bucket."""
    kept = [i for i in ids if i >= 0]
    return [p[i] for i in kept] + [math.fsum(x for i, x in enumerate(p) if i not in kept)]


def floored(value: torch.Tensor | float, floor: float) -> torch.Tensor:
    """max(value, floor), with no gradient below the floor."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return value if value.item() > floor else torch.tensor(floor, dtype=torch.float64)


def bucket(kind: str, s: torch.Tensor, t: torch.Tensor, beta: float) -> torch.Tensor:
    """One bucket's term of a divergence, from log-probabilities."""
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return t.exp() * (t - s)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return s.exp() * (s - t)
    m = beta * t.exp() + (1 - beta) * s.exp()
    of_teacher = t.exp() * (t - m.log()) if t.item() != NEG_INF else 0.0
    return beta * of_teacher + (1 - beta) * s.exp() * (s - m.log())


def support_loss(
    logits_V: torch.Tensor,
    ids: list[int],
    teacher_lp: list[float],
    teacher_tail: float,
    floor: float,
    kind: str = "reverse_kl",
    beta: float = 0.5,
) -> torch.Tensor:
    """Differentiable divergence of one token on a support with its tail bucket."""
    logprobs = logits_V - torch.logsumexp(logits_V, 0)
    total = logits_V.new_zeros(())
    for i, lp in zip(ids, teacher_lp, strict=True):
        if i >= 0:
            # in a KL an id that the teacher rules out counts as the floor
            ruled_out = lp == NEG_INF and (kind != "jsd" or beta in (0, 1))
            t = torch.tensor(floor if ruled_out else lp, dtype=torch.float64)
            if ruled_out and (kind == "forward_kl" or (kind == "jsd" and beta == 0)):
                continue  # 0 ln 0
            total = total + bucket(kind, logprobs[i], t, beta)
    outside = [i for i in range(len(logits_V)) if i not in ids]
    if outside:
        tail = floored(torch.logsumexp(logprobs[outside], 0), floor)
        total = total + bucket(kind, tail, floored(teacher_tail, floor), beta)
    return total


def kept_loss(
    hidden, head, ids, teacher_lp, teacher_tail, weight, floor=-30.0, **kind
) -> torch.Tensor:
    """Dense reference of the loss: all logits at once, autograd for the gradients."""
    total = (hidden.sum() + head.sum()) * 0
    for n, logits_V in enumerate(hidden @ head.T):
        total = total + weight[n] * support_loss(
            logits_V, ids[n].tolist(), teacher_lp[n].tolist(), float(teacher_tail[n]), floor, **kind
        )
    return total


def soft_or_keep(h, d, offsets, retention, keep_at_least=1):
    """soft_or by sorting in plain Python."""
    h, d = [float(x) for x in h], [float(x) for x in d]
    if not h:
        return np.zeros(0, bool)
    clip = sorted(h)[math.floor(0.98 * (len(h) - 1))]
    hh, dd = scaled([min(x, clip) for x in h]), scaled(d)
    score = [1 - (1 - a) * (1 - b) for a, b in zip(hh, dd, strict=True)]
    return top_of_rows(score, offsets, retention, keep_at_least)


def scaled(values):
    low, high = min(values), max(values)
    return [0.0 if high == low else (x - low) / (high - low) for x in values]


def top_of_rows(score, offsets, retention, keep_at_least=1):
    keep = np.zeros(len(score), bool)
    for start, end in pairwise(offsets):
        m = end - start
        k = min(max(math.floor(retention * m + 1e-9), keep_at_least), m)
        best = sorted(range(start, end), key=lambda t: (-score[t], t))[:k]
        keep[best] = True
    return keep
