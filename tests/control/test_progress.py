"""The lines of a run: what a step, an evaluation and an end read like."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from tests.runs_made import made_evaluation, made_metrics, made_status
from tip_ray.contract.run_state import RunState
from tip_ray.control.progress import TerminalProgress, shortest, size, step_line, summary


def test_a_step_is_one_line() -> None:
    metrics = made_metrics(
        7, loss=0.12345, kept_fraction=0.5, tokens_generated=3000, seconds_step=1.5
    )
    assert step_line(metrics, 40, 0.719) == (
        "step  7/40  loss 0.1235  kept 50.0%  accuracy 71.9%  2,000 tokens/s  1.5 s"
        "  update skipped: not finite"
    )
    calm = made_metrics(7, update_skipped=0, loss=math.nan)
    assert "loss nan" in step_line(calm, 40, None)
    assert "accuracy -" in step_line(calm, 40, None)
    assert "skipped" not in step_line(calm, 40, None)


def test_a_log_file_gets_plain_lines_and_a_terminal_a_bar_too() -> None:
    def told(terminal: bool) -> str:
        console = Console(file=io.StringIO(), force_terminal=terminal, soft_wrap=True, width=60)
        progress = TerminalProgress(console)
        progress.message("starts [here]")
        for step in (1, 2):
            progress.step(made_metrics(step), 2, 0.5)
        progress.evaluation(made_evaluation(2, 0.9))
        progress.finish(made_status("a-run", state=RunState.SUCCEEDED), "/runs/a-run", None)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    plain = told(terminal=False)
    assert "\x1b" not in plain
    lines = plain.splitlines()
    assert lines[0] == "starts [here]"
    assert [line for line in lines if line.startswith("step")][1].startswith("step 2/2  loss")
    assert "carry after step 2: 90.0% +- 3.0% of 256 problems, 25 tokens, 0.0% truncated" in lines
    assert "\x1b[?25l" in told(terminal=True)  # the bar hides the cursor


def test_the_summary_says_what_changed_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status = made_status(
        "a-run",
        state=RunState.SUCCEEDED,
        step=40,
        accuracy=0.95,
        initial_accuracy=0.42,
        bytes_shipped=2**20,
        bytes_unpruned=2**22,
    )
    text = "\n".join(
        summary(status, f"{tmp_path}/runs/a-run", f"{tmp_path}/runs/a-run/report.html")
    )
    for expected in (
        "42.0% before, [bold]95.0%[/] after",
        "1.0 MiB, 25% of the 4.0 MiB without selection",
        "runs/a-run/report.html",
        "tip-ray samples runs/a-run ",
    ):
        assert expected in text
    assert str(tmp_path) not in text


def test_the_summary_of_a_failure_says_why_and_how_to_resume() -> None:
    status = made_status("a-run", state=RunState.FAILED, error="a replica [died]")
    lines = summary(status, "s3://b/runs/a-run", None)
    assert any("a replica \\[died]" in line for line in lines)
    assert any("--run-id a-run" in line for line in lines)
    assert not any("accuracy" in line for line in lines)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_sizes_have_binary_units(count: float, text: str) -> None:
    assert size(count) == text


def test_only_paths_inside_the_working_directory_are_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shortest(f"{tmp_path}/runs/a") == "runs/a"
    assert shortest(f"{tmp_path}-other/a") == f"{tmp_path}-other/a"
    assert shortest("s3://bucket/runs/a") == "s3://bucket/runs/a"
