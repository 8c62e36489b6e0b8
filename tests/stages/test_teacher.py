"""The teacher stage against a dense float64 reference made with transformers alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.stages.teacher_toys import (
    FLOOR,
    LENGTHS,
    STUDENT_ROWS,
    TEACHER_ROWS,
    V,
    actor,
    assert_rounded,
    check_against_dense,
    dense_hidden,
    dense_logprobs,
    kl,
    outside,
    rollouts,
    row_values,
    top_k,
)
from tests.stages.toys import save_model
from tip_ray.contract import tables
from tip_ray.contract.errors import TableError
from tip_ray.contract.spec import TeacherSpec
from tip_ray.stages import teacher as teacher_module
from tip_ray.stages.engines.trunk import HiddenStates, Row
from tip_ray.stages.teacher import TeacherActor

SHAPES = {
    "qwen3-tied": {"kind": "qwen3", "tie_word_embeddings": True},
    "qwen3": {"kind": "qwen3"},
    "llama": {"kind": "llama"},
    "llama-tied": {"kind": "llama", "tie_word_embeddings": True},
    "qwen2": {"kind": "qwen2"},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Student and teacher directory of each architecture."""
    root = tmp_path_factory.mktemp("pairs")
    return {
        name: (
            save_model(root / f"{name}-student", 1, vocab_size=STUDENT_ROWS, **shape),
            save_model(root / f"{name}-teacher", 2, vocab_size=TEACHER_ROWS, **shape),
        )
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_all_numbers_equal_a_dense_float64_forward(
    shape: str, pairs: dict[str, tuple[str, str]]
) -> None:
    student, teacher = pairs[shape]
    table = rollouts(student, 4, own_prompts=True)
    header, scores, targets = actor(teacher).score(table.slice(0, 3), table.slice(3))

    assert tables.keys(scores) == tables.keys(targets) == tables.keys(table) == list(header.keys)
    assert header.quarantined == ()
    check_against_dense(table, 4, teacher, scores, targets)
    loss_tokens = int(tables.column(table, "loss_mask").sum())
    assert header.loss_tokens == loss_tokens
    assert header.scores_bytes == scores.nbytes
    mask_N = tables.column(table, "loss_mask") == 1
    masses = np.exp(tables.column(targets, "teacher_logprobs")[mask_N]).sum()
    assert header.teacher_mass_sum == pytest.approx(masses, rel=1e-5)
    masses = np.exp(tables.column(table, "student_topk_logprobs")[mask_N]).sum()
    assert header.student_mass_sum == pytest.approx(masses, rel=1e-5)


def test_support_of_the_whole_vocabulary_gives_the_full_divergence(
    pairs: dict[str, tuple[str, str]],
) -> None:
    student, teacher = pairs["qwen3"]
    table = rollouts(student, V)
    _, scores, targets = actor(teacher, k=V).score(table)
    for row, given in enumerate(table.to_pylist()):
        mask_N = np.array(given["loss_mask"], bool)
        ours_NV = dense_logprobs(student, given["prompt_ids"], given["response_ids"])
        theirs_NV = dense_logprobs(teacher, given["prompt_ids"], given["response_ids"])
        expected = (kl(ours_NV, theirs_NV).numpy(), kl(theirs_NV, ours_NV).numpy())
        for name, value in zip(("reverse_kl", "forward_kl"), expected, strict=True):
            got = row_values(scores, name, row)
            np.testing.assert_allclose(got, value * mask_N, atol=3e-5, rtol=1e-5)
        assert np.isneginf(row_values(targets, "teacher_tail_logprob", row)[mask_N]).all()


def test_batch_and_chunk_sizes_change_nothing(pairs: dict[str, tuple[str, str]]) -> None:
    student, teacher = pairs["llama"]
    table = rollouts(student, 4)
    _, scores, targets = actor(teacher, max_batch_tokens=4096, chunk_rows=512).score(table)
    for max_batch_tokens, chunk_rows in ((1, 1), (30, 7), (60, 100)):
        one = actor(teacher, max_batch_tokens=max_batch_tokens, chunk_rows=chunk_rows)
        shuffled = table.take([4, 0, 6, 3, 1, 5, 2])
        _, other_scores, other_targets = one.score(shuffled)
        assert tables.keys(other_scores) == tables.keys(shuffled)
        for whole, part in ((scores, other_scores), (targets, other_targets)):
            part = part.take([1, 4, 6, 3, 0, 5, 2])
            for name in whole.schema.names[len(tables.KEY_COLUMNS) :]:
                np.testing.assert_allclose(
                    tables.column(whole, name), tables.column(part, name), atol=2e-5, err_msg=name
                )


def test_never_more_rows_of_logits_than_chunk_rows(
    pairs: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    make = teacher_module.head_logits

    def spy(hidden_CD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
        logits_CV = make(hidden_CD, head_VD)
        seen.append(tuple(logits_CV.shape))
        return logits_CV

    monkeypatch.setattr(teacher_module, "head_logits", spy)
    student, teacher = pairs["qwen2"]
    actor(teacher, chunk_rows=3).score(rollouts(student, 4))
    assert max(rows for rows, _ in seen) == 3
    assert sum(rows for rows, _ in seen) == sum(response for _, response in LENGTHS)
    assert {columns for _, columns in seen} == {V}


def test_teacher_support_is_its_own_top_k(pairs: dict[str, tuple[str, str]]) -> None:
    student, teacher = pairs["qwen3-tied"]
    table = rollouts(student, 3)
    _, scores, targets = actor(teacher, k=3, source="teacher").score(table)
    _, reference, _ = actor(teacher, k=3).score(table)
    assert scores.equals(reference)  # scores stay on the student's support
    for row, given in enumerate(table.to_pylist()):
        dense_NV = dense_logprobs(teacher, given["prompt_ids"], given["response_ids"])
        ids_NK, values_NK, tail_N = top_k(dense_NV, 3)
        assert (row_values(targets, "support_ids", row) == ids_NK.numpy()).all()
        got = row_values(targets, "teacher_logprobs", row)
        np.testing.assert_allclose(got, values_NK, atol=3e-5)
        got = row_values(targets, "teacher_tail_logprob", row)
        np.testing.assert_allclose(got, tail_N, atol=3e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_targets_are_the_states_of_transformers_in_bfloat16(
    shape: str, pairs: dict[str, tuple[str, str]]
) -> None:
    student, teacher = pairs[shape]
    table = rollouts(student, 4, own_prompts=True)
    one = actor(teacher, source="union", targets="hidden")
    header, scores, targets = one.score(table.slice(0, 3), table.slice(3))
    expected_header, expected_scores, topk = actor(teacher).score(table)
    assert scores.equals(expected_scores)  # of the states as they were
    assert header.teacher_mass_sum == expected_header.teacher_mass_sum
    assert targets.schema == tables.targets_schema(32, "hidden")
    for name in ("teacher_sampled_logprob", "teacher_top_ids", "teacher_top_logprobs"):
        assert targets.column(name).equals(topk.column(name))
    for row, given in enumerate(table.to_pylist()):
        prompt = given["teacher_prompt_ids"] or given["prompt_ids"]
        exact_ND = dense_hidden(teacher, prompt, given["response_ids"])
        assert_rounded(row_values(targets, "teacher_hidden", row), exact_ND)


def test_hidden_states_of_a_bfloat16_teacher_travel_as_they_are(
    pairs: dict[str, tuple[str, str]],
) -> None:
    student, path = pairs["llama"]
    table = rollouts(student, 4)
    one = actor(path, targets="hidden", dtype="bfloat16", max_batch_tokens=1)
    _, _, targets = one.score(table)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for row, given in enumerate(table.to_pylist()):
        ids = given["prompt_ids"] + given["response_ids"]
        with torch.no_grad():
            hidden_LD = model.base_model(torch.tensor([ids[:-1]]))[0][0]
        own_ND = hidden_LD[len(given["prompt_ids"]) - 1 :][: len(given["response_ids"])]
        found = torch.tensor(row_values(targets, "teacher_hidden", row)).view(torch.bfloat16)
        assert torch.equal(found, own_ND)


def test_a_state_beyond_bfloat16_is_quarantined(
    pairs: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, path = pairs["qwen3"]
    table = rollouts(student, 4)
    one = actor(path, targets="hidden", max_batch_tokens=4096)
    one._head_VD = one._head_VD.clone()
    one._head_VD[:, 0] = 0.0  # nothing but the target itself shows it
    read = one._trunk.hidden_states

    def large(rows: Sequence[Row]) -> HiddenStates:
        for places, hidden_ND in read(rows):
            hidden_ND[-1, 0] = torch.finfo(torch.float32).max
            yield places, hidden_ND

    monkeypatch.setattr(one._trunk, "hidden_states", large)
    header, scores, targets = one.score(table)
    assert len(header.quarantined) == 1
    assert "not finite" in header.quarantined[0].reason
    assert scores.num_rows == targets.num_rows == table.num_rows - 1


@pytest.mark.parametrize("k", [3, V])
def test_union_support_names_no_id_twice(k: int, pairs: dict[str, tuple[str, str]]) -> None:
    student, teacher = pairs["qwen3-tied"]
    table = rollouts(student, k)
    _, _, targets = actor(teacher, k=k, source="union").score(table)
    assert targets.schema == tables.targets_schema(2 * k)
    for row, given in enumerate(table.to_pylist()):
        dense_NV = dense_logprobs(teacher, given["prompt_ids"], given["response_ids"])
        theirs = top_k(dense_NV, k)[0].tolist()
        ids_NW = row_values(targets, "support_ids", row)
        logprobs_NW = row_values(targets, "teacher_logprobs", row)
        tail_N = row_values(targets, "teacher_tail_logprob", row)
        for token, mask in enumerate(given["loss_mask"]):
            if not mask:
                continue
            ids = ids_NW[token][ids_NW[token] >= 0].tolist()
            assert len(ids) == len(set(ids))
            assert set(ids) == {*given["student_topk_ids"][token], *theirs[token]}
            assert np.isneginf(logprobs_NW[token][ids_NW[token] < 0]).all()
            expected = dense_NV[token][ids]
            np.testing.assert_allclose(logprobs_NW[token][ids_NW[token] >= 0], expected, atol=3e-5)
            rest = outside(dense_NV[token][None], torch.tensor([ids]))[0]
            np.testing.assert_allclose(tail_N[token], rest, atol=3e-5)


def test_vocabulary_below_the_five_alternatives_shown(tmp_path: Path) -> None:
    path = save_model(tmp_path / "tiny", vocab_size=3)
    table = rollouts_of_three()
    one = TeacherActor(TeacherSpec(model=path, dtype="float32"), path, 3, 2, "student", FLOOR, 64)
    _, _, targets = one.score(table)
    ids_N5 = tables.column(targets, "teacher_top_ids")
    logprobs_N5 = tables.column(targets, "teacher_top_logprobs")
    assert (np.sort(ids_N5[:, :3], axis=1) == [0, 1, 2]).all()
    assert (ids_N5[:, 3:] == -1).all()
    assert np.isneginf(logprobs_N5[:, 3:]).all()
    np.testing.assert_allclose(np.exp(logprobs_N5[:, :3]).sum(1), 1, rtol=1e-5)


def rollouts_of_three() -> pa.Table:
    """Two response tokens over a vocabulary of three ids; the student is uniform."""
    third = float(np.log(1 / 3))
    return tables.build(
        tables.rollouts_schema(2),
        {
            **{name: [0] for name in ("step", "slot", "sample_index", "attempt")},
            "prompt_uid": ["p"],
            "prompt_ids": [[1]],
            "teacher_prompt_ids": pa.array([None], tables.list_of(pa.int32())),
            "response_ids": [[2, 0]],
            "loss_mask": [[1, 1]],
            "student_logprob": [[third, third]],
            "student_entropy": [[-third, -third]],
            "student_topk_ids": [[[0, 1], [1, 2]]],
            "student_topk_logprobs": [[[third, third]] * 2],
            "student_tail_logprob": [[third, third]],
            "weight_version": [0],
            "finish_reason": ["length"],
            "reward": pa.array([None], pa.float32()),
        },
    )


POISONS = {
    "prompt id": ("prompt_ids", lambda v: [V, *v[1:]], "prompt_ids with an id outside"),
    "negative prompt id": ("prompt_ids", lambda v: [-1, *v[1:]], "prompt_ids with an id outside"),
    "no prompt": ("prompt_ids", lambda _: [], "prompt_ids is empty"),
    "teacher prompt": ("teacher_prompt_ids", lambda _: [99], "teacher_prompt_ids with an id"),
    "response id": ("response_ids", lambda v: [*v[:-1], V], "response_ids with an id outside"),
    "support id": (
        "student_topk_ids",
        lambda v: [[V, *v[0][1:]], *v[1:]],
        "student_topk_ids with an id outside",
    ),
    "id twice": ("student_topk_ids", lambda v: [[1] * 4, *v[1:]], "an id twice"),
    "log-probability": ("student_logprob", lambda v: [np.nan, *v[1:]], "student_logprob is not"),
    "entropy": ("student_entropy", lambda v: [np.inf, *v[1:]], "student_entropy is not finite"),
    "support": (
        "student_topk_logprobs",
        lambda v: [[-np.inf] * 4, *v[1:]],
        "student_topk_logprobs is not finite",
    ),
    "tail": ("student_tail_logprob", lambda v: [np.nan, *v[1:]], "tail_logprob is not a number"),
}


@pytest.mark.parametrize("poison", POISONS)
def test_poisonous_row_is_quarantined_alone(poison: str, pairs: dict[str, tuple[str, str]]) -> None:
    name, spoil, reason = POISONS[poison]
    student, teacher = pairs["qwen3"]
    table = rollouts(student, 4)
    values = table.column(name).to_pylist()
    values[2] = spoil(values[2])
    spoiled = tables.build(
        tables.rollouts_schema(4), {**{c: table[c] for c in table.column_names}, name: values}
    )
    header, scores, targets = actor(teacher).score(spoiled)
    assert [(one.key, one.prompt_uid, one.stage) for one in header.quarantined] == [
        ((7, 2, 0), "p2", "teacher")
    ]
    assert reason in header.quarantined[0].reason
    rest = table.take([0, 1, 3, 4, 5, 6])
    assert list(header.keys) == tables.keys(scores) == tables.keys(targets) == tables.keys(rest)
    check_against_dense(rest, 4, teacher, scores, targets)


def test_student_numbers_of_tool_tokens_are_not_read(pairs: dict[str, tuple[str, str]]) -> None:
    student, teacher = pairs["qwen3"]
    table = rollouts(student, 4)
    columns = {name: table[name] for name in table.column_names}
    for name, junk in (
        ("student_topk_ids", [-1] * 4),
        ("student_topk_logprobs", [np.nan] * 4),
        ("student_entropy", np.nan),
        ("student_logprob", np.nan),
    ):
        values = table.column(name).to_pylist()
        for row in values:
            row[2:3] = [junk] * len(row[2:3])  # loss_mask is 0 at 2
        columns[name] = values
    header, scores, _ = actor(teacher).score(tables.build(tables.rollouts_schema(4), columns))
    assert header.quarantined == ()
    _, expected, _ = actor(teacher).score(table)
    assert scores.equals(expected)


def test_teacher_that_gives_no_numbers_quarantines_only_what_it_spoils(
    pairs: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pairs["qwen3"]
    table = rollouts(student, 4)
    one = actor(teacher, max_batch_tokens=4096)
    read, spoiled_row = one._trunk.hidden_states, table.column("prompt_ids")[4].as_py()

    def broken(rows: Sequence[Row]) -> HiddenStates:
        for places, hidden_ND in read(rows):
            ends = np.cumsum([rows[place].response_tokens for place in places])
            for place, end in zip(places, ends.tolist(), strict=True):
                if rows[place].input_ids.tolist()[: len(spoiled_row)] == spoiled_row:
                    hidden_ND[end - 1] = torch.nan
            yield places, hidden_ND

    monkeypatch.setattr(one._trunk, "hidden_states", broken)
    header, scores, targets = one.score(table)
    assert [quarantined.key[1] for quarantined in header.quarantined] == [4]
    assert "not finite" in header.quarantined[0].reason
    rest = table.take([0, 1, 2, 3, 5, 6])
    assert tables.keys(scores) == tables.keys(rest)
    check_against_dense(rest, 4, teacher, scores, targets)


def test_teacher_equal_to_the_student_diverges_nowhere(pairs: dict[str, tuple[str, str]]) -> None:
    student, _ = pairs["qwen3"]
    table = rollouts(student, 4)
    header, scores, targets = actor(student).score(table)
    for name in ("reverse_kl", "forward_kl"):
        assert np.abs(tables.column(scores, name)).max() < 1e-6
    mask_N = tables.column(table, "loss_mask") == 1
    gap_N = tables.column(targets, "teacher_sampled_logprob") - tables.column(
        table, "student_logprob"
    )
    assert np.abs(gap_N[mask_N]).max() < 2e-5
    assert header.teacher_mass_sum == pytest.approx(header.student_mass_sum, rel=1e-5)


def test_read_only_tables_are_read_as_they_are(pairs: dict[str, tuple[str, str]]) -> None:
    student, teacher = pairs["qwen3"]
    table = rollouts(student, 4)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    immutable = pa.ipc.open_stream(pa.py_buffer(sink.getvalue().to_pybytes())).read_all()
    assert not tables.column(immutable, "loss_mask").flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it could write into such memory
        _, scores, _ = actor(teacher).score(immutable)
    assert scores.equals(actor(teacher).score(table)[1])


def test_nothing_to_score_gives_empty_tables(pairs: dict[str, tuple[str, str]]) -> None:
    student, teacher = pairs["qwen3"]
    one = actor(teacher)
    one.ping()
    for table in (rollouts(student, 4).slice(3, 1), tables.empty(tables.rollouts_schema(4))):
        header, scores, targets = one.score(table)
        assert scores.num_rows == targets.num_rows == table.num_rows == len(header.keys)
        assert header.loss_tokens == 0


def test_token_columns_of_other_lengths_are_no_rollouts(
    pairs: dict[str, tuple[str, str]],
) -> None:
    student, teacher = pairs["qwen3"]
    table = rollouts(student, 4)
    columns = {name: table[name] for name in table.column_names}
    columns["student_entropy"] = [row[:-1] for row in table.column("student_entropy").to_pylist()]
    with pytest.raises(TableError, match="'student_entropy': lengths differ"):
        actor(teacher).score(tables.build(tables.rollouts_schema(4), columns))


def test_bfloat16_teacher_is_near_its_float32_self(pairs: dict[str, tuple[str, str]]) -> None:
    student, teacher = pairs["llama"]
    table = rollouts(student, 4)
    _, scores, _ = actor(teacher).score(table)
    _, rough, _ = actor(teacher, dtype="bfloat16").score(table)
    gap = np.abs(tables.column(scores, "reverse_kl") - tables.column(rough, "reverse_kl"))
    assert 0 < gap.mean() < 0.1
