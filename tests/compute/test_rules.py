"""Rules against plain references, and rules of the user's own."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compute.dense_reference import scaled, top_of_rows
from tests.compute.selection_made import big_step, spec, steps
from tip_ray.compute.rules import RULES, find_rule
from tip_ray.compute.selection import select
from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import BUILTIN_RULES

eighths = st.sampled_from([0.0, 0.25, 0.5, 1.0])
powers = st.sampled_from([0.0, 1.0, 2.0, 4.0])


def clipped(values):
    clip = sorted(values)[math.floor(0.98 * (len(values) - 1))]
    return scaled([min(x, clip) for x in values])


def reference_score(rule, h, d, phi, clip_divergence=False):
    """The formulas of TIP, token by token."""
    if rule == "divergence":
        return d
    hhat = clipped(h)
    if rule == "q3":
        return [p * (1 - a) for p, a in zip(phi, hhat, strict=True)]
    dhat = clipped(d) if clip_divergence else scaled(d)
    return [-(1 - (1 - a) * (1 - b)) for a, b in zip(hhat, dhat, strict=True)]


@settings(max_examples=120, deadline=None)
@given(
    steps(eighths, powers),
    st.sampled_from(["divergence", "q3", "soft_or_bottom"]),
    st.floats(0.01, 1.0),
    st.booleans(),
)
def test_rules_equal_plain_references(step, rule, retention, clip_divergence):
    h, d, phi = (column.tolist() for column in step[:3])
    keep = select(spec(rule, retention, clip_divergence=clip_divergence), *step)
    if not h:
        assert not len(keep)
        return
    score = reference_score(rule, h, d, phi, clip_divergence)
    assert np.array_equal(keep, top_of_rows(score, step[3].tolist(), retention))


def test_every_builtin_rule_is_there():
    assert set(RULES) == set(BUILTIN_RULES)


@settings(max_examples=60, deadline=None)
@given(steps(), st.floats(0.01, 1.0), st.integers(0, 3))
def test_prefix_keeps_the_first(step, retention, keep_at_least):
    keep = select(spec("prefix", retention, keep_at_least=keep_at_least), *step)
    for start, end in zip(step[3][:-1], step[3][1:], strict=True):
        m = int(end - start)
        k = min(max(math.floor(retention * m + 1e-9), keep_at_least), m)
        assert keep[start:end].tolist() == [True] * k + [False] * (m - k)


def test_soft_or_and_its_bottom_split_a_rollout_without_ties():
    h, d, phi, _ = big_step(7)
    offsets = [0, len(h) // 2 * 2]
    columns = [column[: offsets[1]] for column in (h, d, phi)]
    # ties at the clip are many in hhat; dhat tells them apart, so scores differ but at 1
    top = select(spec("soft_or"), *columns, offsets)
    bottom = select(spec("soft_or_bottom"), *columns, offsets)
    assert np.array_equal(top, ~bottom)


def test_q3_wants_confident_and_wrong_tokens():
    h, phi = np.array([0.0, 0.0, 1.0, 1.0]), np.array([3.0, 0.1, 5.0, 0.0])
    keep = select(spec("q3", 0.25), h, np.zeros(4), phi, [0, 4])
    assert keep.tolist() == [True, False, False, False]


# --- the user's own


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("made_up_rules")
    monkeypatch.setitem(sys.modules, "made_up_rules", module)
    return module


def test_a_rule_of_the_users_own(user_module):
    seen = []

    def rule(columns):
        seen.append(columns)
        return columns.forward_kl_N - columns.teacher_entropy_N

    user_module.best = rule
    h, d, phi, offsets = big_step(8)
    other = np.random.default_rng(0).random(len(h))
    keep = select(spec("made_up_rules:best", 0.3), h, d, phi, offsets, 5, teacher_entropy_N=other)
    score = (phi.astype(np.float64) - other).tolist()
    assert np.array_equal(keep, top_of_rows(score, offsets.tolist(), 0.3))
    assert np.array_equal(seen[0].entropy_N, h)
    assert np.array_equal(seen[0].reverse_kl_N, d)
    assert seen[0].row_lengths.tolist() == np.diff(offsets).tolist()


def test_a_users_rule_may_answer_flags(user_module):
    user_module.high = lambda columns: columns.entropy_N > 0.5
    h = np.array([0.1, 0.9, 0.2, 0.8])
    keep = select(spec("made_up_rules:high"), h, h, h, [0, 4])
    assert keep.tolist() == [False, True, False, True]


def raises(columns):
    raise KeyError("no such\ncolumn")


def leaves(columns):
    sys.exit("not today")


def writes(columns):
    columns.entropy_N[:] = 0
    return columns.entropy_N


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda columns: columns.entropy_N[1:], r"answered shape \(2,\)"),
        (lambda columns: columns.entropy_N * math.nan, "with 3 NaN"),
        (lambda _: "high", "answered str"),
        (lambda _: None, "answered NoneType"),
        (lambda columns: columns.entropy_N[:, None], r"answered shape \(3, 1\)"),
        (lambda _: 1.0, r"answered shape \(\)"),
        (lambda columns: columns.entropy_N + 1j, "answered an array of complex128"),
        (lambda _: ["1", "2", "3"], "answered an array of <U1"),
        (lambda _: [1.0, None, 2.0], "answered an array of object"),
        (lambda _: [[1.0], [2.0, 3.0], []], r"answered list \(ValueError"),
        (lambda _: torch.ones(3, requires_grad=True), r"answered Tensor \(RuntimeError"),
        (lambda _: (one for one in range(3)), "answered generator"),
        (lambda _a, _b: 0, "raised TypeError"),
        (raises, "raised KeyError"),
        (leaves, "raised SystemExit: not today"),
        (writes, "raised ValueError: assignment destination is read-only"),
    ],
)
def test_wrong_answers_of_a_users_rule_are_one_line(user_module, answer, says):
    user_module.best = answer
    three = np.zeros(3)
    with pytest.raises(SpecError, match=says) as caught:
        select(spec("made_up_rules:best"), three, three, three, [0, 3])
    assert "made_up_rules:best" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["float32", "int8", "bool", "list", "torch"])
def test_a_users_rule_may_answer_any_kind_of_numbers(user_module, kind):
    h, values = np.zeros(4), [0, 1, 0, 1]
    made = {"list": values, "torch": torch.tensor(values)}.get(kind)
    made = np.array(values, kind) if made is None else made
    user_module.best = lambda _: made
    keep = select(spec("made_up_rules:best"), h, h, h, [0, 4])
    assert keep.tolist() == [False, True, False, True]


def test_a_users_rule_cannot_write_into_the_callers_columns(user_module):
    """Float64 columns are not copied: they are the caller's own memory."""
    user_module.best = writes
    h = np.array([0.1, 0.2])
    with pytest.raises(SpecError, match="read-only"):
        select(spec("made_up_rules:best"), h, h, h, [0, 2])
    assert h.tolist() == [0.1, 0.2]
    h[0] = 0.5  # and it stays writable for its owner


def test_rules_that_are_not_there_are_refused(user_module, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_rules.py").write_text("1 / 0\n")
    (tmp_path / "leaving_rules.py").write_text("import sys; sys.exit(3)\n")
    user_module.number = 3
    for name, says in (
        ("no_such_package.rules:best", "ModuleNotFoundError"),
        ("made_up_rules:worst", "a function 'worst' in made_up_rules"),
        ("made_up_rules:number", "a function 'number'"),
        ("broken_rules:best", "ZeroDivisionError"),
        ("leaving_rules:best", "SystemExit: 3"),
        ("q5", "soft_or_bottom"),
    ):
        with pytest.raises(SpecError, match=says) as caught:
            find_rule(name)
        assert "selection.rule" in str(caught.value)
        assert "\n" not in str(caught.value)
