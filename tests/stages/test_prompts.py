"""The prompt source: reading, rendering, order, cursor, and one line for each wrong thing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from tests.stages.toys import CHAT_TEMPLATE, EOS_ID, WORDS, toy_tokenizer
from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import ChatSpec, EvaluationSpec, PromptsSpec
from tip_ray.contract.tables import PROMPTS, keys
from tip_ray.stages.prompts import PromptSource, evaluation_prompts, first_prompt

ROWS = [
    {"problem": f"what is {a} + {b} ?", "answer": str(a + b)} for a, b in [(1, 2), (3, 4), (5, 0)]
]
SEVEN = [{"problem": f"{digit} =", "answer": str(digit)} for digit in range(7)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(where: str, **changes: Any) -> PromptSource:
    outer = {
        "max_prompt_tokens": 16,
        "samples_per_prompt": 2,
        "seed": 5,
        "tokenizer": toy_tokenizer(),
    }
    outer.update({name: changes.pop(name) for name in list(changes) if name in outer})
    theirs = changes.pop("teacher_tokenizer", None)
    return PromptSource(PromptsSpec(source=where, **changes), teacher_tokenizer=theirs, **outer)


def texts(table: pa.Table) -> list[str]:
    """The words of each row's prompt."""
    return [" ".join(WORDS[one] for one in ids) for ids in table.column("prompt_ids").to_pylist()]


def drawn(source: PromptSource, steps: int, prompts_per_step: int = 3) -> list[list[str]]:
    return [texts(source.take(step, prompts_per_step)) for step in range(1, steps + 1)]


def refusal(**changes: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        source(**changes)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return caught.value


def test_rows_are_keyed_by_slot_and_sample(tmp_path: Path) -> None:
    table = source(write(tmp_path / "p.jsonl", ROWS), shuffle=False).take(4, 2)
    assert table.schema == PROMPTS
    assert keys(table) == [(4, 0, 0), (4, 0, 1), (4, 1, 0), (4, 1, 1)]
    assert table.column("attempt").to_pylist() == [0] * 4
    assert texts(table) == ["what is 1 + 2 ?"] * 2 + ["what is 3 + 4 ?"] * 2
    assert table.column("answer").to_pylist() == ["3", "3", "7", "7"]
    assert table.column("teacher_prompt_ids").null_count == 4
    uids = table.column("prompt_uid").to_pylist()
    assert uids[0] == uids[1] != uids[2]


def test_uid_depends_on_text_and_answer_only(tmp_path: Path) -> None:
    def uid(row: dict[str, str]) -> str:
        path = write(tmp_path / "p.jsonl", [row])
        return source(path).take(1, 1).column("prompt_uid")[0].as_py()

    same = uid(ROWS[0])
    assert uid({**ROWS[0], "other": "x"}) == same
    assert uid({**ROWS[0], "answer": "4"}) != same
    assert uid({**ROWS[0], "problem": "what is 2 + 1 ?"}) != same


@pytest.mark.parametrize(
    "place", ["memory", "file", "gz", "json", "parquet", "memory-parquet", "glob"]
)
def test_every_format_reads_the_same(place: str, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"  # a blank line at the end
    where = str(tmp_path / "p.jsonl")
    if place == "memory":
        where = "memory://prompts/p.jsonl"
        with fsspec.open(where, "w") as file:
            file.write(lines)
    elif place == "memory-parquet":
        where = "memory://prompts/p.parquet"
        with fsspec.open(where, "wb") as file:
            pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif place == "file":
        (tmp_path / "p.jsonl").write_text(lines)
        where = f"file://{where}"
    elif place == "gz":
        where += ".gz"
        Path(where).write_bytes(gzip.compress(lines.encode()))
    elif place == "json":
        where = str(tmp_path / "p.json")
        Path(where).write_text(json.dumps(ROWS, indent=1))
    elif place == "parquet":
        where = str(tmp_path / "p.parquet")
        pq.write_table(pa.Table.from_pylist(ROWS), where, row_group_size=1)
    else:
        write(tmp_path / "b.jsonl", ROWS[2:])
        write(tmp_path / "a.jsonl", ROWS[:2])
        where = str(tmp_path / "*.jsonl")
    table = source(where, shuffle=False, samples_per_prompt=1).take(1, 3)
    assert texts(table) == [row["problem"] for row in ROWS]
    assert table.column("answer").to_pylist() == [row["answer"] for row in ROWS]


def test_demo_problems() -> None:
    from tip_ray import demo
    from tip_ray.stages.models import load_tokenizer

    tokenizer = load_tokenizer(str(demo.checkpoint_path("carry-student")))
    made = source("demo:carry", tokenizer=tokenizer, limit=8, shuffle=False, samples_per_prompt=1)
    table = made.take(1, 8)
    expected = demo.problems("carry", limit=8)
    assert [tokenizer.decode(ids) for ids in table["prompt_ids"].to_pylist()] == [
        row["problem"] for row in expected
    ]
    assert table.column("answer").to_pylist() == [row["answer"] for row in expected]
    assert made.longest == max(len(row["problem"]) for row in expected)
    assert "demo:carry-eval" in refusal(where="demo:nothing").expected


def test_epochs_are_shuffled_each_in_its_own_way_and_complete(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", SEVEN)
    made = source(path, samples_per_prompt=1)
    epochs = [texts(made.take(step, 7)) for step in (1, 2, 3)]
    assert all(sorted(one) == [row["problem"] for row in SEVEN] for one in epochs)
    assert len({tuple(one) for one in epochs}) == 3
    assert drawn(source(path, samples_per_prompt=1), 3, 7) == epochs
    assert drawn(source(path, samples_per_prompt=1, seed=6), 3, 7) != epochs
    plain = source(path, samples_per_prompt=1, shuffle=False)
    assert drawn(plain, 2, 7) == [[row["problem"] for row in SEVEN]] * 2


def test_cursor_resumes_anywhere_and_over_the_end_of_an_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", SEVEN)
    made = source(path)
    cursors, steps = [], []
    for step in range(1, 7):
        cursors.append(json.loads(json.dumps(made.cursor)))
        steps.append(made.take(step, 3))
    assert cursors[3]["epoch"] == 1  # 9 of 7 prompts drawn
    for start, cursor in enumerate(cursors):
        other = source(path)
        other.take(1, 5)  # wherever it stood
        other.seek(cursor)
        for step in range(start, 6):
            assert other.take(step + 1, 3).equals(steps[step])


def test_a_step_may_draw_more_than_there_is(tmp_path: Path) -> None:
    table = source(write(tmp_path / "p.jsonl", SEVEN[:2]), samples_per_prompt=1).take(1, 5)
    assert len(set(keys(table))) == 5
    assert len(set(texts(table))) == 2


def test_cursor_of_other_prompts_is_refused(tmp_path: Path) -> None:
    cursor = source(write(tmp_path / "p.jsonl", SEVEN)).cursor
    with pytest.raises(SpecError, match=r"prompts\.source: found changed prompts"):
        source(write(tmp_path / "q.jsonl", SEVEN[:-1])).seek(cursor)


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [*SEVEN[:3], "not read"])
    assert len(source(path, limit=3)) == 3


def test_long_prompts_are_counted_and_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [SEVEN[0], ROWS[0], SEVEN[1], ROWS[1]])
    made = source(path, max_prompt_tokens=5)
    assert (len(made), made.skipped, made.longest) == (2, 2, 2)
    assert len(source(path, max_prompt_tokens=6)) == 4


def test_long_prompt_is_refused_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [SEVEN[0], ROWS[0]])
    error = refusal(where=path, max_prompt_tokens=5, too_long="error")
    assert error.field == "rollout.max_prompt_tokens"
    assert "p.jsonl, row 2: 6 tokens" in error.found


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    error = refusal(where=write(tmp_path / "p.jsonl", ROWS), max_prompt_tokens=2)
    assert "all 3 prompts" in error.found


def test_chat_template_renders_system_and_generation_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ROWS[:1])
    made = source(path, chat=ChatSpec(system="is ?"), samples_per_prompt=1)
    assert texts(made.take(1, 1)) == ["system is ? <end> user what is 1 + 2 ? <end> ="]
    made = source(path, chat=ChatSpec(), samples_per_prompt=1)
    assert texts(made.take(1, 1)) == ["user what is 1 + 2 ? <end> ="]


def test_messages_keep_their_own_system(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "+"}, {"role": "user", "content": "1"}]
    rows = [{"problem": own}, {"problem": own[1:]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for path in (write(tmp_path / "p.jsonl", rows), str(tmp_path / "p.parquet")):
        made = source(path, chat=ChatSpec(system="-"), shuffle=False, samples_per_prompt=1)
        assert texts(made.take(1, 2)) == [
            "system + <end> user 1 <end> =",
            "system - <end> user 1 <end> =",
        ]


def test_template_kwargs_reach_the_template(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(chat_template="{{ messages[0].content }}{% if no %} -{% endif %}")
    path = write(tmp_path / "p.jsonl", SEVEN[:1])
    for kwargs, expected in (({}, "0 ="), ({"no": True}, "0 = -")):
        chat = ChatSpec(template_kwargs=kwargs)
        made = source(path, chat=chat, tokenizer=tokenizer, samples_per_prompt=1)
        assert texts(made.take(1, 1)) == [expected]


def test_special_tokens_are_those_of_the_tokenizer_and_never_doubled(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(chat_template="<s> " + CHAT_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    path = write(tmp_path / "p.jsonl", SEVEN[:1])
    made = source(path, tokenizer=tokenizer, samples_per_prompt=1)
    assert texts(made.take(1, 1)) == ["<s> 0 ="]  # as it stands, with the tokenizer's own BOS
    made = source(path, tokenizer=tokenizer, chat=ChatSpec(), samples_per_prompt=1)
    assert texts(made.take(1, 1)) == ["<s> user 0 = <end> ="]  # the template wrote it already


def test_teacher_reads_its_own_rendering_only_where_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", SEVEN[:1])
    theirs = toy_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %} ?")
    both = {"where": path, "chat": ChatSpec(), "samples_per_prompt": 1, "teacher_tokenizer": theirs}
    allowed = source(**both, allow_template_mismatch=True)
    [ids] = allowed.take(1, 1)["teacher_prompt_ids"].to_pylist()
    assert " ".join(WORDS[one] for one in ids) == "0 = ?"
    assert source(**both).take(1, 1)["teacher_prompt_ids"].to_pylist() == [None]
    both["teacher_tokenizer"] = toy_tokenizer()
    same = source(**both, allow_template_mismatch=True)
    assert same.take(1, 1)["teacher_prompt_ids"].to_pylist() == [None]


def test_teachers_longer_rendering_counts_against_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", SEVEN[:1])
    theirs = toy_tokenizer(chat_template="{{ messages[0].content }} ? ? ? ? ? ? ?")
    both = {"chat": ChatSpec(), "allow_template_mismatch": True, "teacher_tokenizer": theirs}
    assert source(path, max_prompt_tokens=9, **both).longest == 9
    assert "1 prompts" in refusal(where=path, max_prompt_tokens=8, **both).found


@pytest.mark.parametrize(
    ("rows", "changes", "field", "found"),
    [
        ([SEVEN[0], {"question": "1"}], {}, "prompts.field", "row 2 without 'problem'"),
        ([{"problem": None}], {}, "prompts.field", "row 1 without 'problem'"),
        ([{"problem": 7}], {}, "prompts.field", "row 1: a int"),
        ([{"problem": [{"role": "user", "content": "1"}]}], {}, "prompts.field", "row 1: a list"),
        ([{"problem": ""}], {}, "prompts.field", "row 1: an empty prompt"),
        ([{"problem": "unknown"}], {}, "prompts.source", "row 1: the tokenizer refuses 'unknown'"),
        ([{"problem": "1", "answer": ["1"]}], {}, "prompts.answer_field", "'answer' is a list"),
        ([{"problem": 7}], {"chat": ChatSpec()}, "prompts.field", "row 1: 7"),
        ([{"problem": []}], {"chat": ChatSpec()}, "prompts.field", "row 1: []"),
        ([{"problem": ["1"]}], {"chat": ChatSpec()}, "prompts.field", "row 1: ['1']"),
        (
            [{"problem": [{"role": "assistant", "content": "1"}]}],
            {"chat": ChatSpec()},
            "prompts.field",
            "row 1: ends with the assistant",
        ),
        (["text"], {}, "prompts.source", "row 1: 'text'"),
        ([], {}, "prompts.source", "p.jsonl without rows"),
    ],
)
def test_bad_rows_are_named(
    rows: list[Any], changes: dict[str, Any], field: str, found: str, tmp_path: Path
) -> None:
    error = refusal(where=write(tmp_path / "p.jsonl", rows), **changes)
    assert error.field == field
    assert found in error.found


def test_missing_column_lists_what_the_row_has(tmp_path: Path) -> None:
    error = refusal(where=write(tmp_path / "p.jsonl", ROWS), field="question")
    assert error.cure == "the row has: problem, answer"


@pytest.mark.parametrize(
    ("template", "found"),
    [(None, "no chat template"), ("{{ raise_exception('only users') }}", "only users")],
)
def test_templates_that_fail_are_named(template: str | None, found: str, tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(chat_template=template)
    path = write(tmp_path / "p.jsonl", ROWS)
    error = refusal(where=path, chat=ChatSpec(), tokenizer=tokenizer)
    assert (error.field, found in error.found) == ("prompts.chat", True)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"problem": "1"}\n{"problem": \n')
    (tmp_path / "broken.json").write_text('[\n{"problem": "1"},\n]')
    (tmp_path / "object.json").write_text('{"problem": "1"}')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é"}'.encode("latin-1"))
    (tmp_path / "p.txt").write_text("1")
    expected = {
        "missing.jsonl": "no file",
        "*.csv": "no file",
        "": "a directory",
        "broken.jsonl": "line 2",
        "broken.json": "line 3",
        "object.json": "dict",
        "broken.parquet": "broken.parquet",
        "broken.jsonl.gz": "gzip",
        "latin.jsonl": "utf-8",
        "p.txt": "p.txt",
    }
    for name, found in expected.items():
        error = refusal(where=f"{tmp_path}/{name}")
        assert error.field == "prompts.source"
        assert found in error.found
    assert "nosuch" in refusal(where="nosuch://bucket/p.jsonl").found


def evaluation(path: str, tokenizer: Any = None, prompts: Any = None, **changes: Any) -> pa.Table:
    entry = EvaluationSpec(name="toy", source=path, **changes)
    prompts = prompts or PromptsSpec(source="demo:carry")
    tokenizer = tokenizer or toy_tokenizer()
    return evaluation_prompts(entry, prompts, max_prompt_tokens=8, tokenizer=tokenizer)


def test_evaluation_asks_each_problem_in_order(tmp_path: Path) -> None:
    rows = [{"q": row["problem"], "a": int(row["answer"])} for row in ROWS]
    prompts = PromptsSpec(source="demo:carry", field="q", answer_field="a")
    path = write(tmp_path / "e.jsonl", rows)
    table = evaluation(path, prompts=prompts, samples=2, limit=2)
    assert keys(table) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert texts(table) == ["what is 1 + 2 ?"] * 2 + ["what is 3 + 4 ?"] * 2
    assert table.column("answer").to_pylist() == ["3", "3", "7", "7"]
    assert set(table.column("source").to_pylist()) == {path}


def test_evaluation_renders_as_the_run_does(tmp_path: Path) -> None:
    prompts = PromptsSpec(source="demo:carry", chat=ChatSpec(system="is"))
    table = evaluation(write(tmp_path / "e.jsonl", SEVEN[:1]), prompts=prompts)
    assert texts(table) == ["system is <end> user 0 = <end> ="]


def test_evaluation_needs_answers_and_problems(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SpecError, match=r"prompts\.answer_field: found e\.jsonl, row 2 without"):
        evaluation(write(tmp_path / "e.jsonl", [SEVEN[0], {"problem": "1"}]))
    with pytest.raises(SpecError, match=r"evaluation\.toy\.source: found no file"):
        evaluation(str(tmp_path / "none.jsonl"))
    long = {"problem": " ".join("1" * 9), "answer": "1"}
    with pytest.raises(SpecError, match=r"evaluation\.toy\.source: found only longer ones"):
        evaluation(write(tmp_path / "e.jsonl", [long]))
    assert evaluation(write(tmp_path / "e.jsonl", [long, SEVEN[0]])).num_rows == 1
    assert "toy: 1 problems too long" in caplog.text
    strict = PromptsSpec(source="demo:carry", too_long="error")
    with pytest.raises(SpecError, match="row 1: 9 tokens"):
        evaluation(write(tmp_path / "e.jsonl", [long, SEVEN[0]]), prompts=strict)


def test_first_prompt_is_the_files_first(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ROWS)
    ids = first_prompt(PromptsSpec(source=path), toy_tokenizer())
    assert [WORDS[one] for one in ids] == ROWS[0]["problem"].split()
    assert EOS_ID not in ids
