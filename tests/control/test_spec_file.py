"""Spec files: what they may say, how they are overridden, and what a mistake reads like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tip_ray.contract.errors import RunDirectoryError, SpecError
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.spec_check import parse_spec
from tip_ray.control.spec_file import (
    check_resume,
    differences,
    dump_spec,
    load_spec,
    parse_assignments,
)
from tip_ray.control.templates import TEMPLATES

JOB_SPECS = Path(__file__).parents[2] / "job_specs"
QUICKSTART = JOB_SPECS / "quickstart.yaml"

SMALL = """\
name: small
steps: 4
student: {model: a}
teacher: {model: b}
prompts: {source: c.jsonl}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return written(tmp_path, SMALL)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return path


def refusal(source: Path | str, *assignments: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        load_spec(source, parse_assignments(assignments))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("path", sorted(JOB_SPECS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_spec_parses(path: Path) -> None:
    assert load_spec(path).steps > 0


@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_template_parses(kind: str, tmp_path: Path) -> None:
    assert load_spec(written(tmp_path, TEMPLATES[kind])).evaluation


def test_the_quickstart_template_is_the_shipped_spec() -> None:
    assert QUICKSTART.read_text() == TEMPLATES["quickstart"]


def test_a_spec_is_read_from_any_file_system() -> None:
    with fsspec.open("memory://specs/small.yaml", "w") as file:
        file.write(SMALL)
    assert load_spec("memory://specs/small.yaml").name == "small"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("name: a\nsteps: [1\n", 3, "expected ',' or ']'"),
        ("name: a\nsteps: 1\nname: b\n", 3, "the key 'name' a second time"),
        ("name: a\nlearner:\n  lr: 1\n  lr: 2\n", 4, "the key 'lr' a second time"),
        ("name: a\nx: !!python/object:os.system {}\n", 2, "could not determine a constructor"),
        ("name: a\nseed: *nowhere\n", 2, "found undefined alias"),
    ],
)
def test_broken_yaml_names_file_and_line(text: str, line: int, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    error = refusal(path)
    assert str(error).startswith(f"{path}:{line}: ")
    assert says in str(error)


def test_aliases_are_read_but_may_not_multiply(tmp_path: Path) -> None:
    shared = SMALL.replace("{model: a}", "&m {model: a}").replace("{model: b}", "*m")
    assert load_spec(written(tmp_path, shared)).teacher.model == "a"
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    assert "aliases that multiply" in str(refusal(written(tmp_path, laughs)))
    assert "inside its own anchor" in str(refusal(written(tmp_path, "a: &a [*a]\n")))


def test_files_that_are_no_specs(tmp_path: Path) -> None:
    assert "no such file" in str(refusal(tmp_path / "absent.yaml"))
    assert "an empty file" in str(refusal(written(tmp_path, "# nothing\n")))
    assert "a mapping of fields" in str(refusal(written(tmp_path, "- 1\n")))
    assert "Protocol not known" in str(refusal("nowhere://spec.yaml"))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: \xe9\n")
    assert "UTF-8" in str(refusal(latin))
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        load_spec(tmp_path)


def test_assignments_are_yaml(small: Path) -> None:
    overrides = parse_assignments(
        ["learner.lr=3e-4", "prompts.chat={system: null}", "rollout.engine_args.x=1e-2", "seed=7"]
    )
    spec = load_spec(small, overrides)
    assert (spec.learner.lr, spec.seed) == (3e-4, 7)
    assert spec.prompts.chat is not None
    assert spec.rollout.engine_args == {"x": 0.01}  # not the string that YAML 1.1 makes of it


def test_a_list_item_is_named_by_its_index() -> None:
    spec = load_spec(QUICKSTART, parse_assignments(["evaluation.0.limit=10"]))
    assert spec.evaluation[0].limit == 10
    assert "an index below 1" in str(refusal(QUICKSTART, "evaluation.1.limit=10"))
    assert "an index below 1" in str(refusal(QUICKSTART, "evaluation.first.limit=10"))


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("learnr.lr=1", "did you mean learner?"),
        ("learner.l=1", "did you mean lr?"),
        ("evaluation.0.limt=1", "did you mean limit?"),
        ("name.first=1", "name to have fields"),
        ("selection", "expected path=value"),
        ("=1", "expected path=value"),
        ("seed=[1", "--set seed:1"),
        ("learner.lr=-1", "greater than 0"),
    ],
)
def test_a_wrong_assignment_says_what_is_right(assignment: str, says: str) -> None:
    assert says in str(refusal(QUICKSTART, assignment))


def test_rule_all_drops_the_retention_of_the_file_only() -> None:
    assert load_spec(QUICKSTART, {"selection.rule": "all"}).selection.retention == 1.0
    error = refusal(QUICKSTART, "selection.rule=all", "selection.retention=0.2")
    assert "no retention with rule all" in str(error)


def test_overrides_do_not_change_what_they_are_laid_over() -> None:
    before = load_spec(QUICKSTART)
    load_spec(QUICKSTART, {"evaluation.0.limit": 3, "learner.lr": 1.0})
    assert load_spec(QUICKSTART) == before


words = st.text(max_size=12)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    engine_args=st.dictionaries(words, plain, max_size=4),
    model=st.text(min_size=1, max_size=20),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    rule=st.sampled_from(["all", "random", "entropy", "soft_or"]),
)
def test_a_dumped_spec_reads_back_equal(
    engine_args: dict[str, Any], model: str, lr: float, rule: str, tmp_path_factory: Any
) -> None:
    raw = yaml.safe_load(SMALL)
    raw |= {"learner": {"lr": lr}, "rollout": {"engine_args": engine_args}}
    raw |= {"student": {"model": model}, "selection": {"rule": rule}}
    spec = parse_spec(raw)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_spec(spec), encoding="utf-8")
    assert load_spec(path) == spec


def test_words_that_look_like_numbers_stay_words(small: Path, tmp_path: Path) -> None:
    spec = load_spec(small, {"rollout.engine_args": {"a": "3e-4", "b": "1", "c": "no"}})
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_spec(spec))
    assert load_spec(path) == spec


def test_secrets_are_blanked_on_request_only(small: Path) -> None:
    secrets = {
        "prompts.source": "sftp://me:hunter2@host/p.jsonl",
        "student.model": "https://host/m?X-Amz-Signature=abcdef&part=1",
        "rollout.engine_args": {"hf_token": "hf_abc", "max_tokens": 5, "inner": {"api_key": "k-1"}},
    }
    spec = load_spec(small, secrets)
    shown = dump_spec(spec, redact=True)
    for secret in ("hunter2", "abcdef", "hf_abc", "k-1"):
        assert secret not in shown
        assert secret in dump_spec(spec)
    assert "max_tokens: 5" in shown
    assert "part=1" in shown


def test_differences_are_what_is_required_or_changed(small: Path) -> None:
    spec = load_spec(small, {"learner.lr": 1e-3, "learner.replicas": 1, "prompts.chat": {}})
    found = {one.field: (one.value, one.default) for one in differences(spec)}
    assert set(found) == {
        *("name", "steps", "student.model", "teacher.model", "prompts.source"),
        *("learner.lr", "prompts.chat"),
    }
    assert found["learner.lr"] == (1e-3, 3e-4)
    assert found["prompts.chat"] == ({"system": None, "template_kwargs": {}}, None)


def test_differences_of_list_items_are_named_by_index() -> None:
    fields = [one.field for one in differences(load_spec(QUICKSTART))]
    assert "evaluation.0.limit" in fields
    assert "evaluation.0.every_steps" not in fields  # it has its default


MAY_DIFFER = {
    "steps": 99,
    "run_root": "/elsewhere",
    "checkpoint.keep": 9,
    "faults.max_tries": 9,
    "evaluation": [],
    "rollout.replicas": 2,
    "teacher.num_gpus": 1,
    "learner.num_cpus": 2,
    "learner.resources": {"learner": 1},
}
MAY_NOT_DIFFER = {
    "name": "other",
    "seed": 9,
    "max_lag": 0,
    "student.model": "other",
    "selection.retention": 0.1,
    "learner.lr": 1.0,
    "rollout.tensor_parallel": 2,
    "teacher.max_batch_tokens": 1,
    "prompts.chat": {"system": "be brief"},
    "rollout.engine_args": {"seed": 1},
}


@pytest.mark.parametrize("field", MAY_DIFFER)
def test_a_resume_may_change(field: str) -> None:
    check_resume(load_spec(QUICKSTART), load_spec(QUICKSTART, {field: MAY_DIFFER[field]}))


@pytest.mark.parametrize("field", MAY_NOT_DIFFER)
def test_a_resume_may_not_change(field: str) -> None:
    changed = load_spec(QUICKSTART, {field: MAY_NOT_DIFFER[field]})
    with pytest.raises(SpecError) as caught:
        check_resume(load_spec(QUICKSTART), changed)
    assert caught.value.field.startswith(field)


def test_a_refused_resume_names_every_field_and_ignores_blanked_secrets(tmp_path: Path) -> None:
    def resumed(**changes: Any) -> RunSpec:
        secret = {"prompts.source": "sftp://me:hunter2@host/p.jsonl"}
        return load_spec(QUICKSTART, {**secret, **changes})

    stored = tmp_path / "spec.yaml"
    stored.write_text(dump_spec(resumed(), redact=True))
    check_resume(load_spec(stored), resumed())
    with pytest.raises(SpecError, match=r"seed, max_lag: found 9, 0, expected 0, 1"):
        check_resume(load_spec(stored), resumed(seed=9, max_lag=0))
