"""Which loss tokens are kept, and what each kept token weighs.

N  loss tokens of the step, rollout by rollout        R  rollouts, rows [offset[i], offset[i + 1])
B  rollouts of one length        m  that length

A rule (`rules.py`) gives each token one score; the best `retention` of each rollout (or of the
step) are kept. Prompt, tool and pad tokens are never among the N.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tip_ray.compute.columns import Bools, Columns, Floats, Ints, RowKey, check_columns
from tip_ray.compute.row_blocks import row_blocks
from tip_ray.compute.rules import find_rule, quantile_lower
from tip_ray.compute.sampling import inclusion_probabilities, uniform_draws
from tip_ray.contract.errors import SpecError
from tip_ray.contract.headers import QuadrantThresholds
from tip_ray.contract.spec import SelectionSpec


def select(
    spec: SelectionSpec,
    entropy_N: npt.ArrayLike,
    reverse_kl_N: npt.ArrayLike,
    forward_kl_N: npt.ArrayLike,
    row_offsets: npt.ArrayLike,
    seed: int = 0,
    *,
    row_keys: Sequence[RowKey] | None = None,
    teacher_entropy_N: npt.ArrayLike | None = None,
) -> Bools:
    """bool [N]: the tokens that `spec` keeps.

    `entropy_N` is normalised to [0, 1], divergences are in nats, `row_offsets` is [R + 1]. Each
    rollout of m tokens keeps floor(retention m), at least `keep_at_least`; ties go to the earlier
    token. With `row_keys` [R], draws are seeded by key and not by place, so that the order and
    the sharding of the rollouts change nothing. `teacher_entropy_N` (nats) is for rules of the
    user's own. With `reweight: inclusion` counts hold in expectation only.

    Raises:
        SpecError: the rule is not available, or the arrays do not fit together.
        DataError: a value is NaN or infinite; names the first.
    """
    return select_weighted(
        spec,
        entropy_N,
        reverse_kl_N,
        forward_kl_N,
        row_offsets,
        seed,
        row_keys=row_keys,
        teacher_entropy_N=teacher_entropy_N,
    )[0]


def select_weighted(
    spec: SelectionSpec,
    entropy_N: npt.ArrayLike,
    reverse_kl_N: npt.ArrayLike,
    forward_kl_N: npt.ArrayLike,
    row_offsets: npt.ArrayLike,
    seed: int = 0,
    *,
    row_keys: Sequence[RowKey] | None = None,
    teacher_entropy_N: npt.ArrayLike | None = None,
) -> tuple[Bools, npt.NDArray[np.float32]]:
    """(keep_N, weight_N): as `select`, with each token's weight before normalisation; 0: dropped.

    `reweight: inclusion` keeps each token by a draw of its own and weighs it by the inverse of
    its inclusion probability: (1/N) sum weight g is then unbiased for the mean of all g.

    Raises:
        SpecError: as `select`.
        DataError: as `select`.
    """
    rule = find_rule(spec.rule)
    columns = check_columns(
        entropy_N, reverse_kl_N, forward_kl_N, row_offsets, seed, row_keys, teacher_entropy_N
    )
    if spec.reweight == "inclusion":
        inclusion_N = inclusion_probabilities(spec, columns)
        keep_N = uniform_draws(columns) < inclusion_N
        return keep_N, np.where(keep_N, 1.0 / inclusion_N, 0.0).astype(np.float32)
    score_N = rule(spec, columns)
    if spec.scope == "rollout":
        keep_N = _best_of_rows(score_N, columns.row_offsets, lambda m: _count(spec, m))
    else:
        keep_N = _best_of_step(spec, score_N, columns)
    return keep_N, keep_N.astype(np.float32)


def normalised_entropy(entropy_nats_N: npt.ArrayLike, vocab_size: int) -> Floats:
    """h = H / ln V in [0, 1]; rounding is clamped. 0 for a vocabulary of one id."""
    largest_nats = max(math.log(vocab_size), float(np.finfo(np.float64).tiny))
    return np.clip(np.asarray(entropy_nats_N, np.float64) / largest_nats, 0.0, 1.0)


# Quadrants


def quadrant_thresholds(
    entropy_N: npt.ArrayLike, divergence_N: npt.ArrayLike, quantiles: tuple[float, float]
) -> QuadrantThresholds:
    """The step's quantiles of (normalised entropy, divergence in nats); 0 without any token."""
    entropy_N, divergence_N = np.asarray(entropy_N), np.asarray(divergence_N)
    if not len(entropy_N):
        return QuadrantThresholds(0.0, 0.0)
    return QuadrantThresholds(
        quantile_lower(entropy_N, quantiles[0]), quantile_lower(divergence_N, quantiles[1])
    )


def quadrants(
    entropy_N: npt.ArrayLike,
    divergence_N: npt.ArrayLike,
    entropy_threshold: float,
    divergence_threshold: float,
) -> npt.NDArray[np.uint8]:
    """uint8 [N]: 1 high/high, 2 high/low, 3 low/high (overconfident and wrong), 4 low/low.

    In the order entropy/divergence; high is strictly above the threshold.
    """
    low_entropy_N = ~(np.asarray(entropy_N) > entropy_threshold)
    low_divergence_N = ~(np.asarray(divergence_N) > divergence_threshold)
    return np.asarray(1 + 2 * low_entropy_N + low_divergence_N, np.uint8)


# What kept tokens weigh, and who trains on them


def loss_weights(
    keep_N: npt.ArrayLike,
    weight_N: npt.ArrayLike,
    row_offsets: npt.ArrayLike,
    normalize: Literal["token", "rollout"],
    *,
    divide_by: Literal["kept", "all"] = "kept",
) -> npt.NDArray[np.float32]:
    """float32 [N] coefficients with which the step's loss is a plain sum over kept tokens.

    token: weight / kept tokens of the step. rollout (TIP, Eq. 9): weight / (kept tokens of its
    rollout x rollouts with kept tokens). The divisor counts tokens, whatever they weigh; 0 where
    dropped. `divide_by` all, for inverse inclusion weights, counts all loss tokens instead, and
    rollouts that have any.
    """
    keep_N, weight_N = np.asarray(keep_N, bool), np.asarray(weight_N, np.float64)
    counted_N = keep_N if divide_by == "kept" else np.ones(len(keep_N), bool)
    if normalize == "token":
        divisor_N = np.full(len(keep_N), max(int(counted_N.sum()), 1))
    else:
        offsets = np.asarray(row_offsets, np.int64)
        counted_R = np.diff(np.concatenate([[0], np.cumsum(counted_N)])[offsets])
        rows = (counted_R > 0).sum()
        divisor_N = np.repeat(np.maximum(counted_R, 1) * rows, np.diff(offsets))
    return np.where(keep_N, weight_N / np.maximum(divisor_N, 1), 0.0).astype(np.float32)


def balance_rows(row_tokens: Sequence[int] | npt.NDArray[Any], ranks: int) -> Ints:
    """int64 [rows]: the learner rank of each row, longest row first to the least loaded rank.

    Ties go to the earlier row and the lower rank. -1 for a row of 0 tokens: nobody trains on it.

    Raises:
        SpecError: `ranks` is below 1.
    """
    if ranks < 1:
        raise SpecError("ranks", str(ranks), "at least 1")
    tokens_R = np.asarray(row_tokens, np.int64)
    rank_R = np.full(len(tokens_R), -1, np.int64)
    loads = [(0, rank) for rank in range(ranks)]
    for row in np.argsort(-tokens_R, kind="stable").tolist():
        if tokens_R[row] > 0:
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + int(tokens_R[row]), rank))
            rank_R[row] = rank
    return rank_R


# The top of each rollout, or of the step


def _count(spec: SelectionSpec, m: int) -> int:
    """How many tokens a rollout of m keeps."""
    return min(max(_fraction_of(spec, m), spec.keep_at_least), m)


def _fraction_of(spec: SelectionSpec, m: int) -> int:
    return math.floor(spec.retention * m + 1e-9)  # 0.1 * 30 is a hair under 3 in floating point


def _best_of_rows(score_N: Floats, row_offsets: Ints, count: Callable[[int], int]) -> Bools:
    """The `count(m)` best of each row of m."""
    keep_N = np.zeros(len(score_N), bool)
    for index_Bm in row_blocks(row_offsets):
        keep_N[index_Bm] = _best(score_N[index_Bm], count(index_Bm.shape[1]))
    return keep_N


def _best(score_Bm: Floats, count: int) -> Bools:
    """The `count` largest of each row; equal scores in order of position."""
    if count == 0:
        return np.zeros(score_Bm.shape, bool)
    place = score_Bm.shape[1] - count
    least_B1 = np.partition(score_Bm, place, axis=1)[:, place : place + 1]
    above_Bm, equal_Bm = score_Bm > least_B1, score_Bm == least_B1
    room_B1 = count - above_Bm.sum(1, keepdims=True)
    return np.asarray(above_Bm | (equal_Bm & (equal_Bm.cumsum(1, dtype=np.int32) <= room_B1)))


def _best_of_step(spec: SelectionSpec, score_N: Floats, columns: Columns) -> Bools:
    """The best of the whole step; a rollout left below `keep_at_least` gets its best on top."""
    order_N = _order_by_key(columns)
    keep_N = np.zeros(len(score_N), bool)
    count = _fraction_of(spec, len(score_N))
    keep_N[order_N] = _best(score_N[order_N][None], count)[0]
    at_least = spec.keep_at_least
    return keep_N | _best_of_rows(score_N, columns.row_offsets, lambda m: min(at_least, m))


def _order_by_key(columns: Columns) -> Ints:
    """[N] tokens with rollouts in order of their keys: ties then do not depend on their order."""
    row_N = np.repeat(np.arange(len(columns.row_lengths)), columns.row_lengths)
    if columns.row_keys is not None:
        rows = range(len(columns.row_lengths))
        by_key = sorted(rows, key=lambda row: tuple(columns.key(row)))
        row_N = np.argsort(np.asarray(by_key, np.int64))[row_N]
    return np.argsort(row_N, kind="stable")
