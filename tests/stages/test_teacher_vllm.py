"""vLLM as the teacher's trunk: what the transformers one gives, on a real engine on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.stages.teacher_toys import (
    CLOSE_NATS,
    FLOOR,
    VLLM_LLAMA,
    V,
    assert_rounded,
    assert_same,
    dense_hidden,
    rollouts,
    row_values,
)
from tests.stages.toys import save_model
from tip_ray import demo
from tip_ray.contract import tables
from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import TeacherSpec
from tip_ray.stages.engines.trunk import Row
from tip_ray.stages.engines.trunk_vllm import ELSEWHERE, INEXACT, VllmTrunk, build_trunk_args
from tip_ray.stages.teacher import TeacherActor

# (prompt, response) tokens: rows of one token, without a response, and above a cached block (128).
LENGTHS = ((3, 5), (1, 1), (9, 12), (4, 0), (140, 7), (6, 3), (1, 12), (300, 90))
LONG = ((4000, 60),)
CARRY_V = 15
CARRY_LENGTHS = tuple((5 + i, 3 * i) for i in range(1, 19))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A toy student and a toy teacher, which vLLM's attention on the CPU takes (heads of 32)."""
    root = tmp_path_factory.mktemp("pair")
    return save_model(root / "student", 1, **VLLM_LLAMA), save_model(
        root / "teacher", 2, **VLLM_LLAMA
    )


def spec(path: str, **changes: Any) -> TeacherSpec:
    settings: dict[str, Any] = {"model": path, "dtype": "float32", "engine": "vllm"}
    settings |= {"max_batch_tokens": 256, "chunk_rows": 50}
    return TeacherSpec(**settings | changes)


@contextmanager
def teacher(
    path: str,
    k: int = 4,
    vocab_size: int = V,
    source: str = "student",
    max_row_tokens: int = 4608,
    **changes: Any,
) -> Iterator[TeacherActor]:
    """A teacher that is closed in the end: two in-process engines share their process groups."""
    given = spec(path, **changes)
    made = TeacherActor(given, path, vocab_size, k, source, FLOOR, max_row_tokens)
    try:
        yield made
    finally:
        made._trunk.close()


def twice(table: pa.Table) -> pa.Table:
    """Every row a second time under another key: prompts and responses that repeat."""
    again = tables.build(
        table.schema,
        {
            **{name: table[name] for name in table.column_names},
            "slot": [slot + 100 for slot in table["slot"].to_pylist()],
        },
    )
    return tables.concat([table, again], table.schema)


def toy_table(student: str) -> pa.Table:
    """Short rows twice, with prompts in common, and one of thousands of tokens."""
    some = twice(rollouts(student, 4, own_prompts=True, lengths=LENGTHS))
    return tables.concat([some, rollouts(student, 4, lengths=LONG)], some.schema)


@pytest.fixture(scope="module")
def expected(pair: tuple[str, str]) -> tuple[Any, ...]:
    """What the transformers trunk gives on the toy pair."""
    with teacher(pair[1], engine="transformers", engine_args={}) as reference:
        return reference.score(toy_table(pair[0]))


def test_equals_the_transformers_trunk_on_a_toy_llama(
    pair: tuple[str, str], expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, path = pair
    table = toy_table(student)
    with teacher(path) as ours:
        assert ours._trunk.head_VD.shape == (V, 64)
        assert_same(ours.score(table), expected)

        stream = ours._trunk.hidden_states([Row(np.arange(9), 3)] * 600)
        places, hidden_ND = next(stream)
        assert len(places) < 600
        stored_bytes = hidden_ND.untyped_storage().nbytes()
        assert stored_bytes == len(places) * 3 * 64 * 4, "only response tokens are kept"
        stream.close()
        assert not ours._trunk._engine.has_unfinished_requests()

        # A failure in the middle leaves nothing behind either.
        with monkeypatch.context() as patch:
            patch.setattr(ours, "_score_chunk", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ours.score(table)
        assert_same(ours.score(table), expected)


def test_chunked_prefill_loses_no_hidden_state(
    pair: tuple[str, str], expected: tuple[Any, ...]
) -> None:
    """A user may ask for it, where a row of thousands of tokens at once needs too much memory."""
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 200}
    with teacher(pair[1], engine_args=settings) as ours:
        assert ours._trunk._engine.vllm_config.scheduler_config.max_num_batched_tokens == 200
        assert_same(ours.score(toy_table(pair[0])), expected)


def test_equals_the_transformers_trunk_on_the_carry_teacher() -> None:
    """A trained Qwen3 with a tied head, whole vocabulary and union supports."""
    student, path = (
        str(demo.checkpoint_path(f"demo:carry-{one}")) for one in ("student", "teacher")
    )
    table = rollouts(student, CARRY_V - 3, lengths=CARRY_LENGTHS, vocab_size=CARRY_V)
    settings: dict[str, Any] = {"k": CARRY_V - 3, "vocab_size": CARRY_V, "source": "union"}
    settings |= {"max_row_tokens": 96}
    with teacher(path, **settings, engine="transformers") as reference:
        expected = reference.score(table)
    with teacher(path, **settings) as ours:
        found = ours.score(table)
        ours._spec = ours._spec.model_copy(update={"targets": "hidden"})
        _, scores, targets = ours.score(table)
    assert_same(found, expected)
    assert tables.column(found[1], "reverse_kl").max() > 1  # there was something to get wrong
    assert scores.equals(found[1])
    for row, given in enumerate(table.to_pylist()):
        exact_ND = dense_hidden(path, given["prompt_ids"], given["response_ids"])
        assert_rounded(row_values(targets, "teacher_hidden", row), exact_ND, CLOSE_NATS)


def test_bfloat16_teacher_is_near_its_float32_self() -> None:
    """The student's numbers are the teacher's own dense ones, so what is left is rounding."""
    path = str(demo.checkpoint_path("demo:carry-teacher"))
    table = rollouts(path, 8, lengths=CARRY_LENGTHS, vocab_size=CARRY_V)
    with teacher(path, k=8, vocab_size=CARRY_V, max_row_tokens=96, dtype="bfloat16") as ours:
        assert ours._trunk.head_VD.dtype == torch.bfloat16
        header, scores, _ = ours.score(table)
    assert header.quarantined == ()
    loss_N = tables.column(table, "loss_mask") == 1
    assert 0 < tables.column(scores, "reverse_kl")[loss_N].mean() < 0.005


def test_longest_row_fits_and_a_longer_one_is_quarantined(pair: tuple[str, str]) -> None:
    student, path = pair
    table = rollouts(student, 4, lengths=((60, 4), (60, 5), (3, 2)))
    with teacher(path, max_row_tokens=64) as ours:
        header, scores, targets = ours.score(table)
        nothing = ours.score(rollouts(student, 4, lengths=((4, 0),)))
    assert [(one.key, one.stage) for one in header.quarantined] == [((7, 1, 1), "teacher")]
    assert "65 tokens for the teacher to read, at most 64" in header.quarantined[0].reason
    assert tables.keys(scores) == tables.keys(targets) == [(7, 0, 0), (7, 2, 0)]
    assert nothing[0].loss_tokens == 0
    assert nothing[1].num_rows == 1


def refused(**engine_args: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        build_trunk_args(spec("x", engine_args=engine_args), "x", 64)
    assert "\n" not in str(caught.value)
    return caught.value


def test_unknown_engine_arg_is_one_line_with_the_nearest() -> None:
    error = refused(max_num_seq=4)
    assert error.field == "teacher.engine_args.max_num_seq"
    assert "did you mean max_num_seqs?" in str(error)


@pytest.mark.parametrize("name", [*ELSEWHERE, *INEXACT])
def test_what_loses_hidden_states_or_is_set_elsewhere_is_refused(name: str) -> None:
    error = refused(**{name: 1})
    assert error.field == f"teacher.engine_args.{name}"
    assert error.cure


def test_the_lists_name_arguments_that_exist() -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert not (set(ELSEWHERE) | set(INEXACT)) - known


def test_a_value_that_vllm_refuses_is_one_line(pair: tuple[str, str]) -> None:
    """Batches below the longest row, without chunks: its hidden states would never come."""
    given = spec(pair[1], engine_args={"max_num_batched_tokens": 32})
    with pytest.raises(
        SpecError, match=r"^teacher\.engine_args: .*max_num_batched_tokens"
    ) as error:
        VllmTrunk(given, pair[1], V, 64)
    assert "\n" not in str(error.value)


def test_gpus_need_another_vllm() -> None:
    with pytest.raises(SpecError, match=r"teacher\.num_gpus: found 1, expected 0"):
        build_trunk_args(spec("x", num_gpus=1), "x", 64)
