from __future__ import annotations

import math
import signal
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from tip_ray.compute.math_process import MathProcess
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
    with pytest.raises(SpecError, match=r"reward\.scorer.*maths.*exact \| last_number \| math"):
        scorer("maths", "reward.scorer")


# --- mathematics


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so $\boxed{\frac{1}{2}}$", "0.5", 1.0),
        (r"it is \boxed{\frac12}", r"\frac{1}{2}", 1.0),
        (r"\boxed{x+1}", "1+x", 1.0),
        (r"thus $\boxed{3\sqrt{2}}$", r"3\sqrt{2}", 1.0),
        (r"thus $\boxed{3}$", r"3\sqrt{2}", 0.0),
        (r"$\boxed{(1,2)}$", "(1,2)", 1.0),
        ("the answer is 42", "#### 42", 1.0),
        (r"first 42, then \boxed{41}", "42", 0.0),
        ("no idea", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_math(response, answer, right):
    assert scorer("math")(response, answer) == right


def test_math_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(SpecError, match="pip install math-verify"):
        scorer("math", "reward.scorer")


@pytest.fixture(scope="module")
def impatient():
    process = MathProcess(step_limit_s=1)
    assert process.same("2", "2")
    yield process
    process.close()


def test_the_time_limit_holds_outside_of_the_main_thread(impatient):
    with ThreadPoolExecutor(2) as threads:
        answers = [
            threads.submit(impatient.same, rf"\boxed{{{one}}}", "3") for one in ("10^{10^8}", "3")
        ]
        assert [one.result(timeout=60) for one in answers] == [False, True]


def test_a_process_that_hangs_or_dies_is_replaced(impatient):
    impatient._process.kill()
    impatient._process.wait()
    assert impatient.same(r"\boxed{7}", "7")
    impatient._process.send_signal(signal.SIGSTOP)
    assert not impatient.same(r"\boxed{7}", "7")
    assert impatient.same(r"\boxed{7}", "7")


def test_math_without_its_package_in_the_new_process_says_so(monkeypatch):
    process = MathProcess()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SpecError, match=r"'math' \(EOFError\).*pip install math-verify"):
        process.same("1", "1")


# --- the user's own


def test_a_scorer_of_the_users_own(monkeypatch):
    module = types.ModuleType("made_up_scorers")
    monkeypatch.setitem(sys.modules, "made_up_scorers", module)
    module.length = lambda response, answer: len(response) / len(answer)
    assert scorer("made_up_scorers:length")("ab", "abcd") == 0.5
    with pytest.raises(SpecError, match="raised ZeroDivisionError"):
        scorer("made_up_scorers:length")("ab", "")
    module.wrong = lambda response, _: response or None
    for response in ("word", ""):
        with pytest.raises(SpecError, match=r"reward\.scorer.*a finite number"):
            scorer("made_up_scorers:wrong", "reward.scorer")(response, "1")
    module.nothing = lambda *_: math.nan
    with pytest.raises(SpecError, match="answered nan"):
        scorer("made_up_scorers:nothing")("1", "1")
    with pytest.raises(SpecError, match="no_such_package"):
        scorer("no_such_package:length")
    module.leaves = lambda *_: sys.exit(3)
    with pytest.raises(SpecError, match="raised SystemExit: 3"):
        scorer("made_up_scorers:leaves")("1", "1")
    module.flag = lambda response, answer: response == answer
    assert scorer("made_up_scorers:flag")("1", "1") == 1.0
    module.short = lambda _: 1.0
    for path, says in (("short", "raised TypeError"), ("missing", "a function 'missing'")):
        with pytest.raises(SpecError, match=says) as caught:
            scorer(f"made_up_scorers:{path}", "reward.scorer")("1", "1")
        assert "reward.scorer" in str(caught.value)
        assert "\n" not in str(caught.value)
