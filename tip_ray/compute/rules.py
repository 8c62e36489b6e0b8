"""The rules: what each loss token of the step scores; higher scores are kept first.

N  loss tokens of the step, rollout by rollout

Rules and normalisation follow TIP (arXiv 2604.14084); all arithmetic is in float64. A rule of the
user's own, `package.module:function`, is called as

    function(columns: tip_ray.compute.columns.Columns) -> array [N]

once a step, with the columns of SCORES at all loss tokens; it answers one number a token, never
NaN, of which the largest are kept: bool and integer arrays do as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from tip_ray.compute.columns import Columns, Floats, numbers
from tip_ray.compute.sampling import race_scores, uniform_draws
from tip_ray.compute.user_function import call_function, load_function
from tip_ray.contract.errors import DataError, SpecError
from tip_ray.contract.spec import SelectionSpec

Rule = Callable[[SelectionSpec, Columns], Floats]
CLIP_QUANTILE = 0.98  # of TIP: entropies above it say no more


def find_rule(name: str) -> Rule:
    """The rule of that name, or the user's own `package.module:function`.

    Raises:
        SpecError: there is none, or it cannot be imported.
    """
    if name in RULES:
        return RULES[name]
    if ":" not in name:
        expected = f"{' | '.join(RULES)} | package.module:function"
        raise SpecError("selection.rule", repr(name), expected)
    return partial(_of_user, load_function(name, "selection.rule"))


def _of_user(
    function: Callable[..., npt.ArrayLike], spec: SelectionSpec, columns: Columns
) -> Floats:
    answer = call_function(function, spec.rule, "selection.rule", columns)
    expected = f"one number for each of {len(columns.entropy_N)} tokens, never NaN"
    answered = numbers("selection.rule", answer, expected, f"{spec.rule!r} answered ")
    score_N = np.asarray(answered, np.float64)
    if score_N.shape != columns.entropy_N.shape or np.isnan(score_N).any():
        found = f"{spec.rule!r} answered shape {score_N.shape}"
        if np.isnan(score_N).any():
            found += f" with {int(np.isnan(score_N).sum())} NaN"
        raise SpecError("selection.rule", found, expected)
    return score_N


def _all(_: SelectionSpec, columns: Columns) -> Floats:
    return np.zeros(len(columns.entropy_N))


def _entropy(_: SelectionSpec, columns: Columns) -> Floats:
    return columns.entropy_N


def _divergence(_: SelectionSpec, columns: Columns) -> Floats:
    return columns.reverse_kl_N


def _q3(_: SelectionSpec, columns: Columns) -> Floats:
    """phi (1 - hhat): confident, and far below where the teacher puts its mass."""
    hhat_N, _dhat_N = normalise_step(columns.entropy_N, columns.reverse_kl_N)
    return np.asarray(columns.forward_kl_N * (1.0 - hhat_N))


def _soft_or(spec: SelectionSpec, columns: Columns) -> Floats:
    hhat_N, dhat_N = normalise_step(
        columns.entropy_N, columns.reverse_kl_N, clip_divergence=spec.clip_divergence
    )
    return soft_or_score(hhat_N, dhat_N)


def _soft_or_bottom(spec: SelectionSpec, columns: Columns) -> Floats:
    return np.asarray(-_soft_or(spec, columns))


def _random(_: SelectionSpec, columns: Columns) -> Floats:
    return uniform_draws(columns)


def _prefix(_: SelectionSpec, columns: Columns) -> Floats:
    first_N = np.repeat(columns.row_offsets[:-1], columns.row_lengths)
    return np.asarray(first_N - np.arange(len(first_N)), np.float64)


RULES: dict[str, Rule] = {
    "all": _all,
    "entropy": _entropy,
    "entropy_sample": race_scores,
    "divergence": _divergence,
    "q3": _q3,
    "soft_or": _soft_or,
    "soft_or_bottom": _soft_or_bottom,
    "random": _random,
    "prefix": _prefix,
}


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
