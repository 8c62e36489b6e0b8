"""RolloutActor on the demo's student: tables, keys, seeds, quarantine, evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.stages.rollout_toys import reference_model
from tip_ray import demo
from tip_ray.compute.scorers import last_number
from tip_ray.contract.errors import DataError, SpecError, TableError
from tip_ray.contract.headers import RolloutHeader
from tip_ray.contract.seeds import derive_seed
from tip_ray.contract.spec import EvaluationSpec, RewardSpec, RolloutSpec, StudentSpec
from tip_ray.contract.tables import (
    ANSWERS,
    PROMPTS,
    build,
    column,
    concat,
    conform,
    keys,
    nbytes,
    offsets,
    rollouts_schema,
)
from tip_ray.demo.carry import CHARACTERS
from tip_ray.runtime.weights import WeightGroup
from tip_ray.stages.rollout import MIN_ROWS, RolloutActor, repeated_ngram_fraction

MODEL = "demo:carry-student"
PATH = str(demo.checkpoint_path(MODEL))
VOCAB, K, EOS, MAX_TOKENS, SEED = 15, 6, (14,), 64, 3
PROBLEMS = ("27+18=", "127+218=", "99+11=", "305+512=", "64+88=", "10+10=")


def actor(engine: str, reward: str | None = None, **changes: Any) -> RolloutActor:
    settings = {"engine": engine, "max_response_tokens": 40, **changes}
    student = StudentSpec(model=MODEL, dtype="float32")
    sizes = (PATH, VOCAB, K, EOS, MAX_TOKENS, SEED)
    return RolloutActor(student, RolloutSpec(**settings), *sizes, RewardSpec(scorer=reward))


@pytest.fixture(scope="module")
def rollout() -> RolloutActor:
    return actor("transformers")


@pytest.fixture(scope="module")
def real() -> Iterator[RolloutActor]:
    made = actor("vllm")
    yield made
    made._engine.close()


def encoded(text: str) -> list[int]:
    return [CHARACTERS.index(one) for one in text]


def prompts(
    texts: tuple[str, ...] = PROBLEMS, samples: int = 4, step: int = 5, **columns: Any
) -> pa.Table:
    """One row a rollout, as the source makes them."""
    rows = [(slot, sample) for slot in range(len(texts)) for sample in range(samples)]
    values: dict[str, Any] = {
        "step": [step] * len(rows),
        "slot": [slot for slot, _ in rows],
        "sample_index": [sample for _, sample in rows],
        "attempt": [sample % 2 for _, sample in rows],
        "prompt_uid": [f"uid-{slot}" for slot, _ in rows],
        "prompt_ids": [encoded(texts[slot]) for slot, _ in rows],
        "teacher_prompt_ids": [encoded("1=") if slot % 2 else None for slot, _ in rows],
        "answer": [texts[slot] for slot, _ in rows],
        "source": ["test"] * len(rows),
    }
    return build(PROMPTS, values | columns)


def run(one: RolloutActor, table: pa.Table) -> tuple[list[RolloutHeader], list[pa.Table]]:
    stream = list(one.generate(table))
    headers, tables = stream[::2], stream[1::2]
    assert len(headers) == len(tables)
    assert all(isinstance(header, RolloutHeader) for header in headers)
    return headers, tables


def by_key(tables: list[pa.Table]) -> dict[Any, dict[str, Any]]:
    table = concat(tables, rollouts_schema(K))
    return dict(zip(keys(table), table.to_pylist(), strict=True))


@pytest.mark.parametrize("fixture", ["rollout", "real"])
def test_tables_and_headers(fixture: str, request: pytest.FixtureRequest) -> None:
    one, asked = request.getfixturevalue(fixture), prompts()
    headers, tables = run(one, asked)
    assert len(headers) > 1
    assert all(len(header.keys) >= MIN_ROWS for header in headers[:-1])
    for header, table in zip(headers, tables, strict=True):
        assert conform(table, rollouts_schema(K), full=True).equals(table)
        assert list(header.keys) == keys(table)
        lengths = np.diff(offsets(table, "response_ids"))
        assert list(header.response_tokens) == lengths.tolist()
        row_tokens = np.diff(offsets(table, "prompt_ids")) + lengths
        assert list(header.row_tokens) == row_tokens.tolist()
        reasons = table.column("finish_reason").to_pylist()
        assert header.truncated == tuple(reason == "length" for reason in reasons)
        assert header.table_bytes == nbytes(table) > 0
        assert header.weight_version == 0
        assert header.busy_s > 0
        assert header.quarantined == ()
        assert (column(table, "loss_mask") == 1).all()
        assert len(column(table, "loss_mask")) == lengths.sum()
    rows, expected = by_key(tables), dict(_keyed(asked))
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        for name in ("prompt_ids", "teacher_prompt_ids", "prompt_uid", "attempt"):
            assert row[name] == expected[key][name]
        assert row["reward"] is None
        assert row["weight_version"] == 0
        assert (row["response_ids"][-1] in EOS) == (row["finish_reason"] == "stop")


def _keyed(table: pa.Table) -> list[tuple[Any, dict[str, Any]]]:
    return list(zip(keys(table), table.to_pylist(), strict=True))


@pytest.mark.parametrize("fixture", ["rollout", "real"])
def test_recorded_numbers_are_those_of_the_checkpoint(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    model = reference_model(PATH)
    _, tables = run(request.getfixturevalue(fixture), prompts(samples=2))
    for row in by_key(tables).values():
        ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
        with torch.no_grad():
            logits_TV = model(ids, use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1]
        logprobs_mV = logits_TV.double().log_softmax(-1)
        sampled = logprobs_mV.gather(1, torch.tensor(row["response_ids"])[:, None]).squeeze(1)
        entropy = -(logprobs_mV.exp() * logprobs_mV).sum(-1)
        top = logprobs_mV.topk(K).values
        np.testing.assert_allclose(row["student_logprob"], sampled, atol=1e-4)
        np.testing.assert_allclose(row["student_entropy"], entropy, atol=1e-4)
        np.testing.assert_allclose(row["student_topk_logprobs"], top, atol=1e-4)
        left = np.log1p(-top.exp().sum(-1).numpy())
        sure = top.exp().sum(-1).numpy() < 1 - 1e-6  # beyond it the difference is rounding noise
        np.testing.assert_allclose(
            np.array(row["student_tail_logprob"])[sure], left[sure], rtol=1e-3
        )


def test_a_key_has_its_response_whatever_is_asked_beside_it(rollout: RolloutActor) -> None:
    everything = by_key(run(rollout, prompts())[1])
    shuffled = prompts().take(np.random.default_rng(0).permutation(24)[:9])
    for key, row in by_key(run(rollout, shuffled)[1]).items():
        assert row["response_ids"] == everything[key]["response_ids"]


def test_seeds_come_from_step_slot_and_sample(
    rollout: RolloutActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    generate = rollout._engine.generate

    def watched(requests: Any) -> Any:
        seen.update({request.index: request.seed for request in requests})
        return generate(requests)

    monkeypatch.setattr(rollout._engine, "generate", watched)
    asked = prompts()
    run(rollout, asked)
    assert seen == {row: derive_seed(SEED, *key) for row, key in enumerate(keys(asked))}
    first = by_key(run(rollout, asked)[1])
    second = by_key(run(rollout, prompts(step=6))[1])
    differing = sum(
        row["response_ids"] != second[(6, *key[1:])]["response_ids"] for key, row in first.items()
    )
    assert differing > 0


def test_spec_decides_temperature_length_and_nucleus() -> None:
    greedy = actor("transformers", temperature=0.0, max_response_tokens=5)
    rows = by_key(run(greedy, prompts())[1])
    assert {len(row["response_ids"]) for row in rows.values()} == {5}
    assert {row["finish_reason"] for row in rows.values()} == {"length"}
    nucleus = by_key(run(actor("transformers", top_p=1e-9, max_response_tokens=5), prompts())[1])
    for slot in range(len(PROBLEMS)):
        responses = [rows[5, slot, sample]["response_ids"] for sample in range(4)]
        assert responses == [responses[0]] * 4
        assert nucleus[5, slot, 0]["response_ids"] == responses[0]


def test_poisonous_rows_are_quarantined_and_the_others_come_back(rollout: RolloutActor) -> None:
    table = prompts(samples=1)
    ids = table.column("prompt_ids").to_pylist()
    ids[1], ids[2], ids[3], ids[4] = [], [3, 15], [3, -1], [1] * 25
    table = table.set_column(
        table.schema.get_field_index("prompt_ids"),
        table.schema.field("prompt_ids"),
        pa.array(ids, table.schema.field("prompt_ids").type),
    )
    headers, tables = run(rollout, table)
    assert sorted(by_key(tables)) == [(5, 0, 0), (5, 5, 0)]
    quarantined = [one for header in headers for one in header.quarantined]
    assert [(one.key, one.prompt_uid, one.stage) for one in quarantined] == [
        ((5, slot, 0), f"uid-{slot}", "rollout") for slot in (1, 2, 3, 4)
    ]
    assert [one.reason for one in quarantined] == [
        "the prompt is empty",
        "token id 15 is outside the vocabulary of 15",
        "token id -1 is outside the vocabulary of 15",
        "25 prompt + 40 response tokens, at most 64",
    ]


def test_nothing_but_poison_still_answers(rollout: RolloutActor) -> None:
    headers, tables = run(rollout, prompts(texts=("", ""), samples=1))
    assert len(headers) == 1
    assert len(headers[0].quarantined) == 2
    assert headers[0].keys == ()
    assert tables[0].equals(rollouts_schema(K).empty_table())
    assert run(rollout, PROMPTS.empty_table()) == ([], [])


def test_a_table_of_another_kind_is_refused(rollout: RolloutActor) -> None:
    with pytest.raises(TableError, match="column 'source': missing"):
        next(rollout.generate(prompts().drop_columns(["source"])))


@pytest.mark.parametrize("fixture", ["rollout", "real"])
def test_new_weights_give_a_new_version(fixture: str, request: pytest.FixtureRequest) -> None:
    one = request.getfixturevalue(fixture)
    assert "version 0" in one.ping()
    old = reference_model(PATH)
    teacher = reference_model(demo.checkpoint_path("demo:carry-teacher"))
    entry = EvaluationSpec(name="sums", source="demo:carry-eval")
    problems = demo.carry.problems("carry-eval", 48)
    table = prompts(
        texts=tuple(row["problem"] for row in problems),
        samples=1,
        answer=[row["answer"] for row in problems],
    )
    try:
        assert column(evaluated(one, table, entry), "score").mean() < 0.7
        assert one.load_weights(3, *groups(teacher)) == 3
        headers, tables = run(one, prompts())
        assert {header.weight_version for header in headers} == {3}
        assert {row["weight_version"] for row in by_key(tables).values()} == {3}
        assert "version 3" in one.ping()
        assert column(evaluated(one, table, entry), "score").mean() > 0.9
    finally:
        one.load_weights(0, *groups(old))


def groups(model: torch.nn.Module) -> list[WeightGroup]:
    """bfloat16, as learners publish, two tensors a group."""
    named = [(name, one.detach().to(torch.bfloat16)) for name, one in model.named_parameters()]
    return [WeightGroup.pack(dict(named[at : at + 2])) for at in range(0, len(named), 2)]


def evaluated(one: RolloutActor, problems: pa.Table, entry: EvaluationSpec) -> pa.Table:
    """All ANSWERS, in the order of their keys."""
    answers = concat([part for part in one.evaluate(problems, entry) if part is not None], ANSWERS)
    return answers.sort_by([("slot", "ascending"), ("sample_index", "ascending")]).combine_chunks()


def test_evaluation_scores_the_decoded_text(rollout: RolloutActor) -> None:
    """Answers are what the student writes: then every row is right, and with others none."""
    greedy = by_key(run(actor("transformers", temperature=0.0), prompts(samples=1))[1])
    texts = [
        "".join(CHARACTERS[one] for one in greedy[5, slot, 0]["response_ids"] if one not in EOS)
        for slot in range(len(PROBLEMS))
    ]
    entry = EvaluationSpec(name="sums", source="demo:carry-eval", max_response_tokens=40)
    right = evaluated(rollout, prompts(samples=1, answer=texts), entry)
    assert conform(right, ANSWERS, full=True).equals(right)
    assert column(right, "score").tolist() == [1.0] * len(PROBLEMS)
    assert keys(right) == keys(prompts(samples=1))
    assert column(right, "response_tokens").tolist() == [
        len(greedy[5, slot, 0]["response_ids"]) for slot in range(len(PROBLEMS))
    ]
    wrong = evaluated(rollout, prompts(samples=1, answer=[text + "1" for text in texts]), entry)
    assert column(wrong, "score").tolist() == [0.0] * len(PROBLEMS)
    number = evaluated(
        rollout,
        prompts(samples=1, answer=[text.split("*")[-1] for text in texts]),
        EvaluationSpec(name="sums", source="x", scorer="last_number", max_response_tokens=40),
    )
    assert column(number, "score").tolist() == [1.0] * len(PROBLEMS)
    short = evaluated(
        rollout, prompts(samples=1), EvaluationSpec(name="sums", source="x", max_response_tokens=2)
    )
    assert column(short, "truncated").tolist() == [1] * len(PROBLEMS)
    assert column(right, "truncated").sum() < len(PROBLEMS)


def test_evaluations_at_different_steps_are_paired(rollout: RolloutActor) -> None:
    entry = EvaluationSpec(name="a", source="x", temperature=9.0, samples=4)  # lengths tell
    first = evaluated(rollout, prompts(step=0), entry)
    later = evaluated(rollout, prompts(step=10), entry)
    other = evaluated(rollout, prompts(step=0), entry.model_copy(update={"name": "b"}))
    tokens = [column(one, "response_tokens").tolist() for one in (first, later, other)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]


def test_evaluation_shows_progress(rollout: RolloutActor) -> None:
    """The pool's deadline is for one item: a whole evaluation may take longer than that."""
    entry = EvaluationSpec(name="sums", source="x", temperature=9.0)  # lengths differ
    items = list(rollout.evaluate(prompts(), entry))
    parts = items[::2]
    assert len(parts) > 1
    assert items[1::2] == [None] * len(parts)
    assert sorted(key for part in parts for key in keys(part)) == sorted(keys(prompts()))


def test_evaluation_refuses_rows_that_cannot_be_scored(rollout: RolloutActor) -> None:
    entry = EvaluationSpec(name="sums", source="x")
    with pytest.raises(DataError, match=r"evaluation sums: prompt uid-0: no reference answer"):
        evaluated(rollout, prompts(answer=[None] * 24), entry)
    with pytest.raises(DataError, match=r"evaluation sums: prompt uid-0: the prompt is empty"):
        evaluated(rollout, prompts(texts=("",)), entry)


def test_rewards_stand_in_header_and_table() -> None:
    scored = actor("transformers", reward="last_number", temperature=0.0)
    sums = [str(sum(map(int, text[:-1].split("+")))) for text in PROBLEMS]
    answers = [sums[slot] for slot in range(len(PROBLEMS)) for _ in range(2)]
    answers[3] = None
    headers, tables = run(scored, prompts(samples=2, answer=answers))
    (lost,) = headers[0].quarantined
    assert (lost.key, lost.reason) == ((5, 1, 1), "no reference answer to reward")
    rewards = {key: row["reward"] for key, row in by_key(tables).items()}
    said = {
        key: "".join(CHARACTERS[one] for one in row["response_ids"] if one not in EOS)
        for key, row in by_key(tables).items()
    }
    assert rewards == {key: last_number(text, sums[key[1]]) for key, text in said.items()}
    assert set(rewards.values()) == {0.0, 1.0}
    for header, table in zip(headers, tables, strict=True):
        assert list(header.rewards) == table.column("reward").to_pylist()


def test_leaving_early_leaves_the_engine_usable(real: RolloutActor) -> None:
    stream = real.generate(prompts())
    next(stream)
    stream.close()
    assert real._engine._engine.get_num_unfinished_requests() == 0
    assert len(by_key(run(real, prompts())[1])) == 24


def test_a_support_wider_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(SpecError, match=r"support\.k"):
        RolloutActor(
            StudentSpec(model=MODEL), RolloutSpec(), PATH, VOCAB, VOCAB + 1, EOS, MAX_TOKENS, SEED
        )


def test_repeated_ngram_fraction() -> None:
    assert repeated_ngram_fraction(np.array([1, 2, 3])) == 0
    assert repeated_ngram_fraction(np.arange(50)) == 0
    assert repeated_ngram_fraction(np.array([7] * 13)) == 9 / 10
    assert repeated_ngram_fraction(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == 1 / 5
    assert repeated_ngram_fraction(np.array([], np.int32)) == 0
