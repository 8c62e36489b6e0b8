"""The demo's problems are right, its splits apart, its two checkpoints as good as documented."""

import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tip_ray.demo import CHECKPOINTS, PROBLEM_SETS, checkpoint_path, problems
from tip_ray.demo.carry import (
    CARRY_FREE_FRACTION,
    CHARACTERS,
    additions,
    corrupted_solution,
    has_carry,
    is_held_out,
    worked_solution,
)
from tip_ray.demo.train import END, END_ID, carry_tokenizer, greedy_accuracy

MAX_PROBLEM_TOKENS = 16
MAX_RESPONSE_TOKENS = 48
STEP = re.compile(r"(\d)\+(\d)\+([01])=(\d{1,2})")


def operands(problem: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{2,3})\+(\d{2,3})=", problem)
    assert match
    return int(match[1]), int(match[2])


def parse(solution: str) -> tuple[list[tuple[int, int, int, int]], int]:
    """The steps (digit, digit, carry, sum) and the answer."""
    work, answer = solution.split(" *")
    steps = []
    for text in work.split(" "):
        match = STEP.fullmatch(text)
        assert match, text
        a, b, carry, total = map(int, match.groups())
        steps.append((a, b, carry, total))
    return steps, int(answer)


@pytest.mark.parametrize("name", PROBLEM_SETS)
def test_solutions_are_right(name: str) -> None:
    for row in problems(name):
        left, right = operands(row["problem"])
        steps, answer = parse(row["answer"])
        assert answer == left + right
        for place, (a, b, carry, total) in enumerate(steps):
            unit = 10**place
            assert (a, b) == (left // unit % 10, right // unit % 10)
            assert carry == (left % unit + right % unit) // unit
            assert total == a + b + carry
        assert len(steps) == len(str(left)) == len(str(right))


@pytest.mark.parametrize("name", PROBLEM_SETS)
def test_rows_are_distinct_short_and_always_the_same(name: str) -> None:
    rows = problems(name)
    assert len({row["problem"] for row in rows}) == len(rows) == PROBLEM_SETS[name]
    assert max(len(row["problem"]) for row in rows) <= MAX_PROBLEM_TOKENS
    assert max(len(row["answer"]) + 1 for row in rows) <= MAX_RESPONSE_TOKENS
    assert problems(f"demo:{name}", limit=7) == rows[:7]
    assert set("".join(row["problem"] + row["answer"] for row in rows)) == set(CHARACTERS)


def test_no_problem_is_in_both_splits_in_either_order() -> None:
    train, held_out = (
        {tuple(sorted(operands(row["problem"]))) for row in problems(name)}
        for name in ("carry", "carry-eval")
    )
    assert not train & held_out


def test_every_prefix_has_the_documented_fraction_of_carries() -> None:
    rows = problems("carry-eval")
    free = [not has_carry(*operands(row["problem"])) for row in rows]
    for count, total in enumerate(itertools.accumulate(free), start=1):
        assert abs(total - CARRY_FREE_FRACTION * count) <= 1


def test_has_carry_counts_carries_that_carry_on() -> None:
    assert has_carry(27, 18)
    assert has_carry(199, 101)
    assert not has_carry(90, 90)
    assert not has_carry(127, 212)


def test_worked_solution_of_the_documented_examples() -> None:
    assert worked_solution(27, 18) == "7+8+0=15 2+1+1=4 *45"
    assert worked_solution(127, 218) == "7+8+0=15 2+1+1=4 1+2+0=3 *345"
    assert worked_solution(95, 15) == "5+5+0=10 9+1+1=11 *110"


def test_a_corrupted_solution_differs_by_dropped_carries_only() -> None:
    never, always = random.Random(0), random.Random(0)
    assert corrupted_solution(27, 18, always, drop_probability=1.0) == "7+8+0=15 2+1+0=3 *35"
    assert corrupted_solution(27, 18, never, drop_probability=0.0) == worked_solution(27, 18)
    assert corrupted_solution(12, 13, always, drop_probability=1.0) == worked_solution(12, 13)


def test_a_corrupted_solution_drops_nine_carries_in_ten() -> None:
    rng = random.Random(0)
    kept = sum(corrupted_solution(27, 18, rng) == worked_solution(27, 18) for _ in range(2000))
    assert 0.08 < kept / 2000 < 0.12


def test_a_stream_stays_on_its_side_of_the_split() -> None:
    for held_out in (True, False):
        stream = itertools.islice(additions(random.Random(0), held_out=held_out), 200)
        assert all(is_held_out(*pair) == is_held_out(*pair[::-1]) == held_out for pair in stream)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"demo:carry-student, demo:carry-teacher"):
        checkpoint_path("demo:carry")
    with pytest.raises(ValueError, match=r"demo:carry, demo:carry-eval"):
        problems("demo:subtract")


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, tip_ray.demo; assert not {'torch', 'transformers'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_tokenizer_is_one_token_a_character(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path(name))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.get_vocab() == carry_tokenizer().get_vocab()
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(CHARACTERS) + 1))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == END_ID
    for row in problems("carry-eval", limit=50):
        text = row["problem"] + row["answer"]
        ids = tokenizer.encode(text)
        assert ids == [CHARACTERS.index(character) for character in text]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, END_ID]) == text + END
        assert tokenizer.decode([*ids, END_ID], skip_special_tokens=True) == text


def test_student_and_teacher_have_the_same_tokenizer() -> None:
    files = [(checkpoint_path(name) / "tokenizer.json").read_bytes() for name in CHECKPOINTS]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_small_and_bfloat16(name: str) -> None:
    path = checkpoint_path(name)
    assert sum(file.stat().st_size for file in path.iterdir()) < 1_000_000
    weights = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "low", "high"), [("carry-teacher", 0.99, 1.0), ("carry-student", 0.36, 0.48)]
)
def test_greedy_accuracy(name: str, low: float, high: float, dtype: torch.dtype) -> None:
    path = checkpoint_path(f"demo:{name}")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    accuracy = greedy_accuracy(model, tokenizer, problems("carry-eval", limit=256))
    assert low <= accuracy <= high
