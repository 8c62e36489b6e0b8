"""Draws of the sampling rules, seeded rollout by rollout with the rollout's key.

N  loss tokens of the step        m  loss tokens of a rollout, or of the step with scope batch
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from tip_ray.compute.columns import Columns, Floats
from tip_ray.contract.seeds import derive_seed
from tip_ray.contract.spec import SelectionSpec

SMALLEST_INCLUSION = 1e-3  # so that no single token weighs more than 1,000


def uniform_draws(columns: Columns) -> Floats:
    """[N] in [0, 1), a stream a rollout."""
    return _draws(columns, lambda generator, m: generator.random(m))


def race_scores(spec: SelectionSpec, columns: Columns) -> Floats:
    """[N] scores whose k largest are k draws without replacement, p proportional to entropy.

    ln h + Gumbel noise (an exponential race in logarithms, so that denormals survive). A token
    without entropy comes after all others, in order of position; where none has any, the draw is
    uniform.
    """
    noise_N = _draws(columns, lambda generator, m: generator.gumbel(size=m))
    weight_N = columns.entropy_N
    if spec.scope == "rollout":
        any_N = np.repeat(_any_of_rows(columns), columns.row_lengths)
        weight_N = np.where(any_N, weight_N, 1.0)
    elif not weight_N.any():
        weight_N = np.ones(len(weight_N))
    log_N = np.full(len(weight_N), -np.inf)
    return np.asarray(np.log(weight_N, out=log_N, where=weight_N > 0) + noise_N)


def inclusion_probabilities(spec: SelectionSpec, columns: Columns) -> Floats:
    """[N] with which probability each token is kept under `reweight: inclusion`.

    They sum to retention m in each rollout (scope batch: over the step), then are floored at
    1e-3. random: all equal. entropy_sample: min(1, c h).
    """
    if spec.rule == "random":
        return np.full(len(columns.entropy_N), max(spec.retention, SMALLEST_INCLUSION))
    ends = columns.row_offsets.tolist()
    if spec.scope == "batch":
        ends = [0, ends[-1]]
    parts = [capped_shares(columns.entropy_N[a:b], spec.retention) for a, b in pairwise(ends)]
    whole_N = np.concatenate(parts) if parts else np.zeros(0)
    return np.maximum(whole_N, SMALLEST_INCLUSION)


def capped_shares(weight_m: Floats, fraction: float) -> Floats:
    """[m] min(1, c weight) with c such that they sum to fraction m.

    Where even all positive weights at 1 do not reach that, the others share the rest evenly.
    """
    positive = int(np.count_nonzero(weight_m))
    budget = fraction * len(weight_m)
    if budget >= positive:
        rest = (budget - positive) / max(len(weight_m) - positive, 1)
        return np.where(weight_m > 0, 1.0, rest)
    order_m = np.argsort(-weight_m, kind="stable")
    sorted_m = weight_m[order_m] / weight_m[order_m[0]]  # scaled: sums of denormals round
    suffix_m = np.cumsum(sorted_m[::-1])[::-1]  # what is left once the j largest are at 1
    left_m = budget - np.arange(len(weight_m))
    at_one = int(np.argmax(left_m * sorted_m <= suffix_m))
    shares_m = np.ones(len(weight_m))
    tail_m = left_m[at_one] * (sorted_m[at_one:] / suffix_m[at_one])
    shares_m[order_m[at_one:]] = np.minimum(tail_m, 1.0)
    return shares_m


def _any_of_rows(columns: Columns) -> np.typing.NDArray[np.bool_]:
    """[R] whether a rollout has a token with entropy."""
    before = np.concatenate([[0], np.cumsum(columns.entropy_N > 0)])
    return np.asarray(np.diff(before[columns.row_offsets]) > 0)


def _draws(columns: Columns, draw: Callable[[np.random.Generator, int], Floats]) -> Floats:
    parts = [
        draw(np.random.Generator(np.random.PCG64(derive_seed(columns.seed, *columns.key(row)))), m)
        for row, m in enumerate(columns.row_lengths.tolist())
    ]
    return np.concatenate(parts) if parts else np.zeros(0)
