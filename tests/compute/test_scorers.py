from __future__ import annotations

import pytest

from tip_ray.compute.scorers import exact, last_number, scorer
from tip_ray.contract.errors import SpecError


def test_exact_ignores_surrounding_white_space_only():
    assert exact(" 7+8=15 *5\n", "7+8=15 *5") == 1.0
    assert exact("7 +8", "7+8") == 0.0
    assert exact("", "") == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so it is 18.", "18"),
        ("18.00 dollars", "18"),
        ("it costs $1,234.50", "1234.5"),
        ("steps 1, 2 and 3", "3"),
        ("12 - 5", "5"),
        ("10-5", "5"),
        ("x = -3", "-3"),
        ("x = \u22123", "-3"),
        ("-$5", "$-5"),
        ("3/4", "0.75"),
        ("-6/8", "-3/4"),
        (".5", "0.50"),
        ("\\boxed{72}", "#### 72"),
        ("1,000,000", "1000000"),
        ("12,3456", "3456"),
        ("007", "7"),
        ("50%", "50"),
    ],
)
def test_last_number_right(response, answer):
    assert last_number(response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "1"),
        ("no number", "no number"),
        ("18", "19"),
        ("first 18 then 19", "18"),
        ("3", "-3"),
        ("0.1", "0.10000000000000001"),
        ("1/0", "1"),
        ("5", ""),
    ],
)
def test_last_number_wrong(response, answer):
    assert last_number(response, answer) == 0.0


def test_lookup_by_name():
    assert scorer("exact") is exact
    assert scorer("last_number") is last_number
    with pytest.raises(SpecError, match=r"math.*exact \| last_number"):
        scorer("math")
