"""Bad input: one line on stderr, exit code 2, and no run directory left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.jobs.harness import QUICKSTART
from tip_ray.cli import main
from tip_ray.demo import checkpoint_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def refused(capsys: pytest.CaptureFixture[str], root: Path, *options: str) -> str:
    """The one line that `tip-ray run` prints."""
    assert main(["run", str(QUICKSTART), "--run-root", str(root), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert not root.exists() or not any(root.iterdir())
    return error


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("learner.learning_rate=1", "learner.learning_rate: found an unknown key"),
        ("selection.retension=0.2", "did you mean retention?"),
        ("selection.retention=1.5", "selection.retention: found 1.5"),
        ("steps=0", "steps: found 0"),
        ("loss.reward_weight=1", "reward.scorer: found null"),
        ("evaluation.0.scorer=no_such_package.scorers:best", "evaluation[0].scorer"),
        ("selection.rule=no_such_package.rules:best", "selection.rule"),
        ("student.model=/no/such/model", "student.model"),
        ("teacher.model=demo:carry-professor", "teacher.model"),
        ("prompts.source=/no/such/file.jsonl", "prompts.source"),
        ("prompts.field=question", "prompts.field"),
        ("rollout.max_prompt_tokens=3", "rollout.max_prompt_tokens"),
        ("rollout.max_response_tokens=4096", "rollout.max_response_tokens"),
    ],
)
def test_fields(
    assignment: str, expected: str, capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    assert expected in refused(capsys, root, "--set", assignment)


def test_an_empty_prompt_file(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "empty.jsonl", [])
    assert source in refused(capsys, root, "--set", f"prompts.source={source}")


def test_a_row_without_the_field(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path
) -> None:
    rows = [{"problem": "12+34=", "answer": "46"}, {"question": "12+34="}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = refused(capsys, root, "--set", f"prompts.source={source}")
    assert "prompts.field" in line
    assert "2" in line  # the row's number


def test_a_prompt_longer_than_the_limit_where_that_is_an_error(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path
) -> None:
    rows = [{"problem": "12+34=", "answer": "46"}, {"problem": "1" * 17, "answer": "1"}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ["--set", f"prompts.source={source}", "--set", "prompts.too_long=error"]
    assert "17 tokens" in refused(capsys, root, *options)


def test_tokenizers_that_differ(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(checkpoint_path("carry-teacher"), teacher)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refused(capsys, root, "--set", f"teacher.model={teacher}")
    assert "'3'" in line
    assert "'4'" in line


def test_a_run_id_with_a_slash(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    assert "--run-id" in refused(capsys, root, "--run-id", "a/b")


def test_a_run_root_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    assert main(["run", str(QUICKSTART), "--run-root", str(blocked / "runs")]) == 2
    error = capsys.readouterr().err
    assert str(blocked) in error
    assert error.count("\n") == 1
