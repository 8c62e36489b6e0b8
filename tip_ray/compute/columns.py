"""The step's columns as rules see them: checked, in float64, one value a loss token.

N  loss tokens of the step, rollout by rollout        R  rollouts, rows [offset[i], offset[i + 1])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tip_ray.contract.errors import DataError, SpecError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
RowKey = Sequence[int | str]


@dataclass(frozen=True)
class Columns:
    """The columns of SCORES at loss tokens (where loss_mask is 1): what a rule may look at.

    No column knows which token was sampled, so that no rule can look at it.
    """

    entropy_N: Floats  # the student's, normalised to [0, 1]
    reverse_kl_N: Floats  # nats; KL(student || teacher)
    forward_kl_N: Floats  # nats; KL(teacher || student)
    teacher_entropy_N: Floats | None  # nats; None where the caller gave none
    row_offsets: Ints  # [R + 1]
    seed: int
    row_keys: Sequence[RowKey] | None

    @property
    def row_lengths(self) -> Ints:
        """[R] loss tokens of each rollout."""
        return np.asarray(np.diff(self.row_offsets))

    def key(self, row: int) -> RowKey:
        """What a rollout's draws are seeded by."""
        return (row,) if self.row_keys is None else self.row_keys[row]


def check_columns(
    entropy_N: npt.ArrayLike,
    reverse_kl_N: npt.ArrayLike,
    forward_kl_N: npt.ArrayLike,
    row_offsets: npt.ArrayLike,
    seed: int,
    row_keys: Sequence[RowKey] | None,
    teacher_entropy_N: npt.ArrayLike | None = None,
) -> Columns:
    """The arrays as Columns.

    Raises:
        SpecError: they do not fit together.
        DataError: a value is NaN or infinite; names the first.
    """
    named = {"entropy": entropy_N, "reverse_kl": reverse_kl_N, "forward_kl": forward_kl_N}
    if teacher_entropy_N is not None:
        named["teacher_entropy"] = teacher_entropy_N
    arrays = {name: np.asarray(values, np.float64) for name, values in named.items()}
    offsets = np.asarray(row_offsets, np.int64)
    if offsets.ndim != 1 or not len(offsets) or offsets[0] or (np.diff(offsets) < 0).any():
        raise SpecError("row_offsets", f"{offsets.tolist()[:8]}", "0 first, then never descending")
    for name, values_N in arrays.items():
        _check_values(name, values_N, offsets)
    if row_keys is not None and len(row_keys) != len(offsets) - 1:
        raise SpecError("row_keys", f"{len(row_keys)} keys", f"{len(offsets) - 1}, one a row")
    return Columns(
        arrays["entropy"],
        arrays["reverse_kl"],
        arrays["forward_kl"],
        arrays.get("teacher_entropy"),
        offsets,
        seed,
        row_keys,
    )


def _check_values(name: str, values_N: Floats, offsets: Ints) -> None:
    if values_N.shape != (offsets[-1],):
        raise SpecError(name, f"shape {values_N.shape}", f"({offsets[-1]},) by row_offsets")
    if not np.isfinite(values_N).all():
        place = int(np.argmin(np.isfinite(values_N)))
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        where = f"token {place} (row {row}, position {place - offsets[row]})"
        raise DataError(f"{name}: found {values_N[place]} at {where}, expected a finite number")
