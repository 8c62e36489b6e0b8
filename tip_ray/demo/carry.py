"""Addition with a written carry: the problems of the quickstart. Standard library only.

    27+18=      ->  7+8+0=15 2+1+1=4 *45
    127+218=    ->  7+8+0=15 2+1+1=4 1+2+0=3 *345

From the lowest digit up, each step reads `digit+digit+carry=sum`; the answer follows `*`. A step's
carry is the one place where the student of the demo goes wrong: it writes 0 where the step before
it reached 10.

A character is a token. A problem is 6 or 8 tokens, a solution with its end token 20 to 33 (25 on
average).
"""

import itertools
import random
import zlib
from collections.abc import Callable, Iterator

PREFIX = "demo:"
"""What a spec writes in front of a name of this package."""

CHARACTERS = "0123456789+= *"
"""The alphabet of problems and solutions; a character's token id is its index here."""

PROBLEM_SETS = {"carry": 4096, "carry-eval": 512}
"""Name -> number of problems. None of `carry-eval` is in `carry`, nor with its operands swapped."""

CARRY_FREE_FRACTION = 0.42
"""Fraction of problems without a carry: the accuracy of right sums that never carry."""

TWO_DIGIT_FRACTION = 2 / 3
"""Fraction of problems with two-digit operands; the others have three digits."""

DROP_PROBABILITY = 0.9
"""Probability that a corrupted solution leaves out a carry, for each carry on its own."""

HELD_OUT_OF = 8
"""One unordered pair of operands in this many is held out for `carry-eval`."""

_SEEDS = {"carry": 1, "carry-eval": 2}


def problem_text(left: int, right: int) -> str:
    """The prompt, such as `127+218=`."""
    return f"{left}+{right}="


def worked_solution(left: int, right: int) -> str:
    """The correct solution, all steps and the answer; operands have the same number of digits."""
    return _solution(left, right, keep_carry=lambda: True)


def corrupted_solution(
    left: int, right: int, rng: random.Random, drop_probability: float = DROP_PROBABILITY
) -> str:
    """A solution that writes each carry as 0 with `drop_probability` and goes on from there."""
    return _solution(left, right, keep_carry=lambda: rng.random() >= drop_probability)


def has_carry(left: int, right: int) -> bool:
    """Whether a digit below the highest sums to 10 or more, carries included."""
    *lower, _ = _digit_pairs(left, right)
    return any(low + high >= 10 for low, high in lower)


def is_held_out(left: int, right: int) -> bool:
    """Whether the problem belongs to `carry-eval`; the same for both orders of the operands."""
    key = f"{min(left, right)}+{max(left, right)}"
    return zlib.crc32(key.encode()) % HELD_OUT_OF == 0


def additions(
    rng: random.Random, *, held_out: bool, distinct: bool = False
) -> Iterator[tuple[int, int]]:
    """A stream of operand pairs from one side of the split; endless unless `distinct`.

    The carry-free ones are spread evenly: every prefix of n pairs holds `CARRY_FREE_FRACTION` * n
    of them, to within one. `distinct` repeats no pair; it can give a few thousand training pairs or
    several hundred held-out ones before the two-digit pairs run out.
    """
    seen: set[tuple[int, int]] = set()
    quota = 0.0
    while True:
        quota += CARRY_FREE_FRACTION
        carry_free = quota >= 1.0
        quota -= carry_free
        pair = _draw(rng, carry=not carry_free, held_out=held_out)
        while pair in seen:
            pair = _draw(rng, carry=not carry_free, held_out=held_out)
        if distinct:
            seen.add(pair)
        yield pair


def problems(name: str, limit: int | None = None) -> list[dict[str, str]]:
    """The problem set `name`, with or without `demo:` in front: distinct rows, always the same.

    Returns:
        At most `limit` rows `{"problem": prompt, "answer": whole worked solution}`.

    Raises:
        ValueError: no problem set has this name; the message lists those that exist.
    """
    bare = name.removeprefix(PREFIX)
    if bare not in PROBLEM_SETS:
        known = ", ".join(PREFIX + known for known in PROBLEM_SETS)
        raise ValueError(f"no demo problem set {name!r}; expected one of {known}")
    size = PROBLEM_SETS[bare] if limit is None else min(limit, PROBLEM_SETS[bare])
    rng = random.Random(_SEEDS[bare])
    stream = additions(rng, held_out=bare == "carry-eval", distinct=True)
    return [
        {"problem": problem_text(left, right), "answer": worked_solution(left, right)}
        for left, right in itertools.islice(stream, size)
    ]


def _draw(rng: random.Random, *, carry: bool, held_out: bool) -> tuple[int, int]:
    """Uniform over the pairs of a random size that match `carry` and `held_out`."""
    digits = 2 if rng.random() < TWO_DIGIT_FRACTION else 3
    low, high = 10 ** (digits - 1), 10**digits
    while True:
        left, right = rng.randrange(low, high), rng.randrange(low, high)
        if has_carry(left, right) == carry and is_held_out(left, right) == held_out:
            return left, right


def _digit_pairs(left: int, right: int) -> list[tuple[int, int]]:
    """Digits of both operands, the lowest first."""
    return [(int(a), int(b)) for a, b in zip(str(left)[::-1], str(right)[::-1], strict=True)]


def _solution(left: int, right: int, keep_carry: Callable[[], bool]) -> str:
    steps: list[str] = []
    answer = ""
    total = 0
    for a, b in _digit_pairs(left, right):
        carry = int(total >= 10 and keep_carry())
        total = a + b + carry
        steps.append(f"{a}+{b}+{carry}={total}")
        answer = f"{total % 10}{answer}"
    leading = "1" if total >= 10 else ""
    return f"{' '.join(steps)} *{leading}{answer}"
