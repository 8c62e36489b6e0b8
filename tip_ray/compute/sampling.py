"""Draws of the sampling rules, seeded rollout by rollout with the rollout's key.

N  loss tokens of the step        m  loss tokens of a rollout, or of the step with scope batch
B  rollouts of one length
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tip_ray.compute.columns import Columns, Floats
from tip_ray.compute.row_blocks import row_blocks
from tip_ray.compute.seed_words import generators
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
    offsets = columns.row_offsets
    if spec.scope == "batch":
        offsets = offsets[[0, -1]]
    share_N = np.zeros(len(columns.entropy_N))
    for index_Bm in row_blocks(offsets):
        share_N[index_Bm] = capped_shares(columns.entropy_N[index_Bm], spec.retention)
    return np.maximum(share_N, SMALLEST_INCLUSION)


def capped_shares(weight_Bm: Floats, fraction: float) -> Floats:
    """[B, m] min(1, c weight) with c such that each row sums to fraction m.

    Where even all positive weights at 1 do not reach that, the others share the rest evenly.
    """
    m = weight_Bm.shape[1]
    budget = fraction * m
    positive_B = np.count_nonzero(weight_Bm, axis=1)
    rest_B = (budget - positive_B) / np.maximum(m - positive_B, 1)
    share_Bm = np.where(weight_Bm > 0, 1.0, rest_B[:, None])
    short_B = budget < positive_B
    share_Bm[short_B] = _scaled_to(budget, weight_Bm[short_B])
    return share_Bm


def _scaled_to(budget: float, weight_Bm: Floats) -> Floats:
    """min(1, c weight) of rows with more positive weights than `budget`."""
    order_Bm = np.argsort(-weight_Bm, axis=1, kind="stable")
    sorted_Bm = np.take_along_axis(weight_Bm, order_Bm, 1)
    sorted_Bm /= sorted_Bm[:, :1].copy()  # scaled: sums of denormals round
    # What is left, of weight and of budget, once the j largest are at 1.
    suffix_Bm = np.cumsum(sorted_Bm[:, ::-1], axis=1)[:, ::-1]
    left_m = budget - np.arange(weight_Bm.shape[1])
    at_one_B = np.argmax(left_m * sorted_Bm <= suffix_Bm, axis=1)
    capped_Bm = np.arange(len(left_m)) < at_one_B[:, None]
    sorted_Bm[capped_Bm] = 0.0  # next to denormals they would overflow
    sorted_Bm /= suffix_Bm[np.arange(len(weight_Bm)), at_one_B][:, None]
    sorted_Bm *= left_m[at_one_B][:, None]
    np.minimum(sorted_Bm, 1.0, out=sorted_Bm)
    sorted_Bm[capped_Bm] = 1.0
    share_Bm = np.empty_like(sorted_Bm)
    np.put_along_axis(share_Bm, order_Bm, sorted_Bm, 1)
    return share_Bm


def _any_of_rows(columns: Columns) -> np.typing.NDArray[np.bool_]:
    """[R] whether a rollout has a token with entropy."""
    before = np.concatenate([[0], np.cumsum(columns.entropy_N > 0)])
    return np.asarray(np.diff(before[columns.row_offsets]) > 0)


def _draws(columns: Columns, draw: Callable[[np.random.Generator, int], Floats]) -> Floats:
    lengths = columns.row_lengths.tolist()
    seeds = [derive_seed(columns.seed, *columns.key(row)) for row in range(len(lengths))]
    parts = [draw(one, m) for one, m in zip(generators(seeds), lengths, strict=True)]
    return np.concatenate(parts) if parts else np.zeros(0)
