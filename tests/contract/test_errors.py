"""Errors cross processes whole, and each knows its exit code."""

from __future__ import annotations

import inspect
import pickle

import pytest

from tip_ray.contract import errors
from tip_ray.contract.errors import SpecError, TipRayError, UserError

ALL = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, TipRayError)
]
EXIT_CODES = {"NotFoundError": 3, "RunCancelledError": 130, "RunTerminatedError": 143}


def made(kind: type[TipRayError]) -> TipRayError:
    if kind is SpecError:
        return SpecError("learner.lr", "-1", "a number above 0", "raise it")
    return kind("one line: what, and what to do")


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_pickling(kind: type[TipRayError]) -> None:
    error = made(kind)
    error.replica = 3  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - bytes of our own
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__
    assert again.replica == 3


@pytest.mark.parametrize("kind", ALL)
def test_exit_codes(kind: type[TipRayError]) -> None:
    expected = EXIT_CODES.get(kind.__name__, 2 if issubclass(kind, UserError) else 1)
    assert made(kind).exit_code == expected


@pytest.mark.parametrize("kind", ALL)
def test_the_drawn_tree_is_the_real_one(kind: type[TipRayError]) -> None:
    lines = (errors.__doc__ or "").splitlines()
    line = next(line for line in lines if f"{kind.__name__} " in f"{line} ")
    depth = len(kind.__mro__) - len(TipRayError.__mro__)
    assert line.index(kind.__name__) == 4 * depth


def test_a_spec_error_is_field_found_expected_cure() -> None:
    error = made(SpecError)
    assert str(error) == "learner.lr: found -1, expected a number above 0; raise it"
    assert str(SpecError("a", "1", "2")) == "a: found 1, expected 2"
