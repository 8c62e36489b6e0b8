"""Is a response right? A scorer takes (response, answer) and returns 1.0 or 0.0."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

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


SCORERS: dict[str, Scorer] = {"exact": exact, "last_number": last_number}


def scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        SpecError: there is none.
    """
    if name not in SCORERS:
        raise SpecError("scorer", repr(name), " | ".join(SCORERS), "use one of them")
    return SCORERS[name]


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
