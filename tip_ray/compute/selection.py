"""Which loss tokens are kept, and what each kept token weighs.

N  loss tokens of the step, rollout by rollout        R  rollouts, rows [offset[i], offset[i + 1])

A rule is a function from the step's columns to one score a token; the best `retention` of each
rollout (or of the step) are kept. Prompt, tool and pad tokens are never among the N. Rules and
normalisation follow TIP (arXiv 2604.14084); all arithmetic is in float64.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tip_ray.contract.errors import DataError, SpecError
from tip_ray.contract.headers import QuadrantThresholds
from tip_ray.contract.seeds import derive_seed
from tip_ray.contract.spec import BUILTIN_RULES, SelectionSpec

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
RowKey = Sequence[int | str]

CLIP_QUANTILE = 0.98  # of TIP: entropies above it say no more


@dataclass(frozen=True)
class Columns:
    """What a rule may look at."""

    entropy_N: Floats  # normalised to [0, 1]
    reverse_kl_N: Floats  # nats
    forward_kl_N: Floats  # nats
    row_offsets: Ints  # [R + 1]
    seed: int
    row_keys: Sequence[RowKey] | None

    @property
    def row_lengths(self) -> Ints:
        return np.asarray(np.diff(self.row_offsets))

    def key(self, row: int) -> RowKey:
        return (row,) if self.row_keys is None else self.row_keys[row]


def select(
    spec: SelectionSpec,
    entropy_N: npt.ArrayLike,
    reverse_kl_N: npt.ArrayLike,
    forward_kl_N: npt.ArrayLike,
    row_offsets: npt.ArrayLike,
    seed: int = 0,
    *,
    row_keys: Sequence[RowKey] | None = None,
) -> Bools:
    """bool [N]: the tokens that `spec` keeps.

    `entropy_N` is normalised to [0, 1], divergences are in nats, `row_offsets` is [R + 1]. Each
    rollout of m tokens keeps floor(retention m), at least `keep_at_least`; ties go to the earlier
    token. With `row_keys` [R], draws are seeded by key and not by place, so that the order and
    the sharding of the rollouts change nothing.

    Raises:
        SpecError: the rule is not available, or the arrays do not fit together.
        DataError: a value is NaN or infinite; names the first.
    """
    rule = _rule(spec.rule)
    columns = _columns(entropy_N, reverse_kl_N, forward_kl_N, row_offsets, seed, row_keys)
    score_N = rule(spec, columns)
    if spec.scope == "rollout":
        return _best_of_rows(score_N, columns.row_offsets, _counts(spec, columns.row_lengths))
    return _best_of_step(spec, score_N, columns)


def select_weighted(
    spec: SelectionSpec,
    entropy_N: npt.ArrayLike,
    reverse_kl_N: npt.ArrayLike,
    forward_kl_N: npt.ArrayLike,
    row_offsets: npt.ArrayLike,
    seed: int = 0,
    *,
    row_keys: Sequence[RowKey] | None = None,
) -> tuple[Bools, npt.NDArray[np.float32]]:
    """(keep_N, weight_N): as `select`, with each token's weight before normalisation; 0: dropped.

    Raises:
        SpecError: as `select`; also `reweight: inclusion`, which is not available yet.
        DataError: as `select`.
    """
    if spec.reweight != "none":
        raise SpecError("selection.reweight", spec.reweight, "none (not available yet)")
    keep_N = select(
        spec, entropy_N, reverse_kl_N, forward_kl_N, row_offsets, seed, row_keys=row_keys
    )
    return keep_N, keep_N.astype(np.float32)


# The rules: higher scores are kept first.


def _all(_: SelectionSpec, columns: Columns) -> Floats:
    return np.zeros(len(columns.entropy_N))


def _entropy(_: SelectionSpec, columns: Columns) -> Floats:
    return columns.entropy_N


def _soft_or(spec: SelectionSpec, columns: Columns) -> Floats:
    hhat_N, dhat_N = normalise_step(
        columns.entropy_N, columns.reverse_kl_N, clip_divergence=spec.clip_divergence
    )
    return soft_or_score(hhat_N, dhat_N)


def _random(_: SelectionSpec, columns: Columns) -> Floats:
    draws = [
        np.random.Generator(np.random.PCG64(derive_seed(columns.seed, *columns.key(row)))).random(m)
        for row, m in enumerate(columns.row_lengths.tolist())
    ]
    return np.concatenate(draws) if draws else np.zeros(0)


Rule = Callable[[SelectionSpec, Columns], Floats]
RULES: dict[str, Rule] = {
    "all": _all,
    "entropy": _entropy,
    "soft_or": _soft_or,
    "random": _random,
}


def _rule(name: str) -> Rule:
    if name in RULES:
        return RULES[name]
    known = name in BUILTIN_RULES or ":" in name
    expected = " | ".join(RULES) + (" (not available yet)" if known else "")
    raise SpecError("selection.rule", repr(name), expected, "use one of them")


# Scores


def normalised_entropy(entropy_nats_N: npt.ArrayLike, vocab_size: int) -> Floats:
    """h = H / ln V in [0, 1]; rounding is clamped. 0 for a vocabulary of one id."""
    largest_nats = max(math.log(vocab_size), float(np.finfo(np.float64).tiny))
    return np.clip(np.asarray(entropy_nats_N, np.float64) / largest_nats, 0.0, 1.0)


def quantile_lower(values: npt.ArrayLike, q: float) -> float:
    """The order statistic sorted[floor(q (n - 1))]: one of the values, exact under sharding.

    Raises:
        DataError: there are no values.
    """
    values_N = np.asarray(values, np.float64)
    if not len(values_N):
        raise DataError("quantile: no values, expected at least one")
    place = math.floor(q * (len(values_N) - 1))
    return float(np.partition(values_N, place)[place])


def normalise_step(
    entropy_N: Floats, divergence_N: Floats, *, clip_divergence: bool = False
) -> tuple[Floats, Floats]:
    """(hhat_N, dhat_N) in [0, 1]: both min-max over the step, entropy clipped at its 0.98 quantile.

    An axis that is constant over the step normalises to 0.
    """
    if not len(entropy_N):
        return np.zeros(0), np.zeros(0)
    hhat_N = _min_max(np.minimum(entropy_N, quantile_lower(entropy_N, CLIP_QUANTILE)))
    if clip_divergence:
        divergence_N = np.minimum(divergence_N, quantile_lower(divergence_N, CLIP_QUANTILE))
    return hhat_N, _min_max(divergence_N)


def soft_or_score(hhat_N: npt.ArrayLike, dhat_N: npt.ArrayLike) -> Floats:
    """1 - (1 - hhat)(1 - dhat), as a + b (1 - a) with a >= b.

    In this form rounding keeps it in [0, 1], symmetric, exactly `a` where b = 0 and 1 where a = 1.
    """
    h_N, d_N = np.asarray(hhat_N, np.float64), np.asarray(dhat_N, np.float64)
    larger_N, smaller_N = np.maximum(h_N, d_N), np.minimum(h_N, d_N)
    return np.asarray(larger_N + smaller_N * (1.0 - larger_N))


def _min_max(values_N: Floats) -> Floats:
    low, high = values_N.min(), values_N.max()
    if low == high:
        return np.zeros(len(values_N))
    return np.asarray((values_N - low) / (high - low))


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
) -> npt.NDArray[np.float32]:
    """float32 [N] coefficients with which the step's loss is a plain sum over kept tokens.

    token: weight / kept tokens of the step. rollout (TIP, Eq. 9): weight / (kept tokens of its
    rollout x rollouts with kept tokens). The divisor counts tokens, whatever they weigh; 0 where
    dropped.
    """
    keep_N, weight_N = np.asarray(keep_N, bool), np.asarray(weight_N, np.float64)
    if normalize == "token":
        divisor_N = np.full(len(keep_N), max(int(keep_N.sum()), 1))
    else:
        offsets = np.asarray(row_offsets, np.int64)
        kept_R = np.diff(np.concatenate([[0], np.cumsum(keep_N)])[offsets])
        divisor_N = np.repeat(np.maximum(kept_R, 1) * (kept_R > 0).sum(), np.diff(offsets))
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


def _counts(spec: SelectionSpec, lengths_R: Ints) -> Ints:
    """How many tokens rows of these lengths keep."""
    # 1e-9: 0.1 * 30 is a hair under 3 in floating point
    fraction_R = np.floor(spec.retention * lengths_R + 1e-9).astype(np.int64)
    return np.asarray(np.minimum(np.maximum(fraction_R, spec.keep_at_least), lengths_R))


def _best_of_rows(score_N: Floats, row_offsets: Ints, counts_R: Ints) -> Bools:
    """The `counts_R[i]` best of row i."""
    lengths_R = np.diff(row_offsets)
    row_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    order_N = np.lexsort((-score_N, row_N))  # stable: equal scores stay in order of position
    keep_N = np.zeros(len(score_N), bool)
    rank_N = np.arange(len(score_N)) - np.repeat(row_offsets[:-1], lengths_R)
    keep_N[order_N[rank_N < np.repeat(counts_R, lengths_R)]] = True
    return keep_N


def _best_of_step(spec: SelectionSpec, score_N: Floats, columns: Columns) -> Bools:
    """The best of the whole step; a rollout left below `keep_at_least` gets its best on top."""
    lengths_R, offsets = columns.row_lengths, columns.row_offsets
    row_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    if columns.row_keys is not None:  # so that ties do not depend on the order of rollouts
        by_key = sorted(range(len(lengths_R)), key=lambda row: tuple(columns.key(row)))
        row_N = np.argsort(np.asarray(by_key, np.int64))[row_N]
    order_N = np.lexsort((row_N, -score_N))
    keep_N = np.zeros(len(score_N), bool)
    keep_N[order_N[: math.floor(spec.retention * len(score_N) + 1e-9)]] = True
    at_least_R = np.minimum(lengths_R, spec.keep_at_least)
    return keep_N | _best_of_rows(score_N, offsets, at_least_R)


def _columns(
    entropy_N: npt.ArrayLike,
    reverse_kl_N: npt.ArrayLike,
    forward_kl_N: npt.ArrayLike,
    row_offsets: npt.ArrayLike,
    seed: int,
    row_keys: Sequence[RowKey] | None,
) -> Columns:
    named = {"entropy": entropy_N, "reverse_kl": reverse_kl_N, "forward_kl": forward_kl_N}
    arrays = {name: np.asarray(values, np.float64) for name, values in named.items()}
    offsets = np.asarray(row_offsets, np.int64)
    if offsets.ndim != 1 or not len(offsets) or offsets[0] or (np.diff(offsets) < 0).any():
        raise SpecError("row_offsets", f"{offsets.tolist()[:8]}", "0 first, then never descending")
    for name, values_N in arrays.items():
        if values_N.shape != (offsets[-1],):
            raise SpecError(name, f"shape {values_N.shape}", f"({offsets[-1]},) by row_offsets")
        if not np.isfinite(values_N).all():
            place = int(np.argmin(np.isfinite(values_N)))
            row = int(np.searchsorted(offsets, place, side="right")) - 1
            where = f"token {place} (row {row}, position {place - offsets[row]})"
            raise DataError(f"{name}: found {values_N[place]} at {where}, expected a finite number")
    if row_keys is not None and len(row_keys) != len(offsets) - 1:
        raise SpecError("row_keys", f"{len(row_keys)} keys", f"{len(offsets) - 1}, one a row")
    return Columns(
        arrays["entropy"], arrays["reverse_kl"], arrays["forward_kl"], offsets, seed, row_keys
    )
