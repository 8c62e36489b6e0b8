"""The step's columns as rules see them: checked, in float64, one value a loss token.

N  loss tokens of the step, rollout by rollout        R  rollouts, rows [offset[i], offset[i + 1])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tip_ray.compute.user_function import one_line
from tip_ray.contract.errors import DataError, SpecError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
RowKey = Sequence[int | str]


@dataclass(frozen=True)
class Columns:
    """The columns of SCORES at loss tokens (where loss_mask is 1): what a rule may look at.

    No column knows which token was sampled, so that no rule can look at it; none can be written.
    """

    entropy_N: Floats  # the student's, normalised to [0, 1]
    reverse_kl_N: Floats  # nats; KL(student || teacher)
    forward_kl_N: Floats  # nats; KL(teacher || student)
    teacher_entropy_N: Floats | None  # nats; None where the caller gave none
    row_offsets: Ints  # [R + 1]
    seed: int
    row_keys: Sequence[RowKey] | None  # [R], no two alike

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
    row_keys: Sequence[RowKey | int | str] | None,
    teacher_entropy_N: npt.ArrayLike | None = None,
) -> Columns:
    """The arrays as Columns.

    Raises:
        SpecError: they are no numbers, do not fit together, or two rollouts have the same key.
        DataError: a value is NaN or infinite; names the first.
    """
    named = {"entropy": entropy_N, "reverse_kl": reverse_kl_N, "forward_kl": forward_kl_N}
    if teacher_entropy_N is not None:
        named["teacher_entropy"] = teacher_entropy_N
    offsets = _offsets(row_offsets)
    arrays = {name: _column(name, values, offsets) for name, values in named.items()}
    return Columns(
        arrays["entropy"],
        arrays["reverse_kl"],
        arrays["forward_kl"],
        arrays.get("teacher_entropy"),
        offsets,
        seed,
        None if row_keys is None else _keys(row_keys, len(offsets) - 1),
    )


def numbers(field: str, values: Any, expected: str, who: str = "") -> npt.NDArray[Any]:
    """`values` as an array of real numbers, of whatever type and shape they are.

    Raises:
        SpecError: they are none; it names `field`, and `who` gave them.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged; torch's own refusals
        found = f"{who}{type(values).__name__} ({one_line(error)})"
        raise SpecError(field, found, expected) from None
    if array.dtype.kind not in "biuf":
        found = type(values).__name__ if array.ndim == 0 else f"an array of {array.dtype}"
        raise SpecError(field, who + found, expected)
    return array


def _column(name: str, values: npt.ArrayLike, offsets: Ints) -> Floats:
    array = numbers(name, values, f"{offsets[-1]} numbers")
    values_N = np.asarray(array, np.float64).view()
    values_N.flags.writeable = False  # a user's rule sees it, and it may be the caller's own
    if values_N.shape != (offsets[-1],):
        raise SpecError(name, f"shape {values_N.shape}", f"({offsets[-1]},) by row_offsets")
    if not np.isfinite(values_N).all():
        place = int(np.argmin(np.isfinite(values_N)))
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        where = f"token {place} (row {row}, position {place - offsets[row]})"
        raise DataError(f"{name}: found {values_N[place]} at {where}, expected a finite number")
    return values_N


def _offsets(row_offsets: npt.ArrayLike) -> Ints:
    expected = "0 first, then whole numbers that never descend"
    array = numbers("row_offsets", row_offsets, expected)
    whole = array.ndim == 1 and len(array) > 0 and (array == np.floor(array)).all()
    if not whole or array[0] or (np.diff(array) < 0).any():
        raise SpecError("row_offsets", f"{array.tolist()!r:.60}", expected)
    return array.astype(np.int64)


def _keys(row_keys: Sequence[Any], rows: int) -> list[RowKey]:
    """Tuples; a number or a word is a key of one part."""
    keys: list[RowKey] = []
    for key in row_keys:
        single = isinstance(key, (int, str, np.integer))
        keys.append((key,) if single else tuple(key))
    if len(keys) != rows:
        raise SpecError("row_keys", f"{len(keys)} keys", f"{rows}, one a row")
    if len(set(keys)) < rows:
        again = next(key for place, key in enumerate(keys) if key in keys[:place])
        cure = "rollouts with the same key would draw the same tokens"
        raise SpecError("row_keys", f"{again} twice", "another key for each row", cure)
    return keys
