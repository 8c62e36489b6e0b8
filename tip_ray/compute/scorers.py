"""How good is a response? A scorer takes (response, answer) and returns a number, 1.0 if right.

Beside the built-in ones, which return 1.0 or 0.0, `package.module:function` names the user's own.
"""

from __future__ import annotations

import importlib.util
import math as numbers
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial

from tip_ray.compute.math_process import MATH
from tip_ray.compute.user_function import call_function, load_function
from tip_ray.contract.errors import SpecError

Scorer = Callable[[str, str], float]

# A sign counts unless something that it could be subtracted from stands right before it.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-+\u2212])?\$?"
    r"(?P<number>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?(?P<denominator>\d+))?"
)


def exact(response: str, answer: str) -> float:
    """1.0 if both are equal once surrounding white space is gone."""
    return float(response.strip() == answer.strip())


def last_number(response: str, answer: str) -> float:
    """1.0 if the response's last number equals the answer's last number, exactly.

    Reads 1,234.50, $5, -3, .5 and 3/4 as numbers; 18.00 equals 18. 0.0 if either has none.
    """
    found, expected = _last_number(response), _last_number(answer)
    return float(found is not None and found == expected)


def math(response: str, answer: str) -> float:
    """1.0 if both are the same mathematics, by the package math-verify.

    Of the response what it boxes counts, else its last formula or number; the answer is LaTeX.
    0.0 where that takes longer than a few seconds.
    """
    return float(MATH.same(response, answer))


SCORERS: dict[str, Scorer] = {"exact": exact, "last_number": last_number, "math": math}


def scorer(name: str, field: str = "scorer") -> Scorer:
    """The scorer of that name, which spec field `field` asks for.

    Raises:
        SpecError: there is none, or it cannot be imported.
    """
    if ":" in name:
        return partial(_of_user, load_function(name, field), name, field)
    if name not in SCORERS:
        expected = f"{' | '.join(SCORERS)} | package.module:function"
        raise SpecError(field, repr(name), expected, "use one of them")
    if name == "math":
        _check_math_verify(field)
    return SCORERS[name]


def _of_user(
    function: Callable[..., object], path: str, field: str, response: str, answer: str
) -> float:
    value = call_function(function, path, field, response, answer)
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = numbers.nan
    if not numbers.isfinite(score):
        raise SpecError(field, f"{path!r} answered {value!r:.60}", "a finite number")
    return score


def _check_math_verify(field: str) -> None:
    if importlib.util.find_spec("math_verify") is None:
        expected = "the package math-verify beside it"
        raise SpecError(field, "'math'", expected, "pip install math-verify")


def _last_number(text: str) -> Fraction | None:
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    value = Fraction(match["number"].replace(",", ""))
    if match["denominator"] is not None:
        denominator = int(match["denominator"])
        if denominator == 0:
            return None
        value /= denominator
    return -value if match["sign"] in ("-", "\u2212") else value
