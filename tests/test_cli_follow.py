"""watch and logs, and what the views look like on a terminal of 60 columns."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs_made import QUICKSTART, made_run, made_samples, made_status
from tip_ray.cli import main
from tip_ray.contract.run_state import RunState
from tip_ray.control.run_directory import LOG, RunDirectory
from tip_ray.control.spec_file import load_spec

Outcome = tuple[int, str, str]
Call = Callable[..., Outcome]
COLUMNS = 60
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Call:
    """Runs one command in an empty directory; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("TIP_RAY_RUN_ROOT", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv: object) -> Outcome:
        code = main([str(one) for one in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def terminal(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The same on a terminal of 60 columns with colours."""
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    return call


def running(monkeypatch: pytest.MonkeyPatch, *statuses: dict[str, Any]) -> RunDirectory:
    """A run with the first status, that goes on to the next whenever a watcher waits."""
    directory = RunDirectory.create("runs", "a-run", load_spec(QUICKSTART))
    following: Iterator[dict[str, Any]] = iter(statuses)

    def go_on(seconds: float = 0.0) -> None:
        directory.write_status(made_status("a-run", **next(following)))

    go_on()
    monkeypatch.setattr("tip_ray.service.client_run.time.sleep", go_on)
    return directory


STEPS = (
    {"state": RunState.STARTING, "waiting_for": "room on the cluster"},
    {"state": RunState.RUNNING, "step": 7, "loss": 0.1234, "kept_fraction": 0.5, "accuracy": 0.71},
    {"state": RunState.RUNNING, "step": 7, "loss": 0.1234, "kept_fraction": 0.5, "accuracy": 0.71},
)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"state": RunState.SUCCEEDED}, 0),
        ({"state": RunState.FAILED, "error": "a replica died"}, 1),
        ({"state": RunState.FAILED, "error": "no room", "exit_code": 2}, 2),
        ({"state": RunState.FAILED, "error": "terminated", "exit_code": 143}, 143),
        ({"state": RunState.CANCELLED}, 130),
    ],
)
def test_watch_follows_to_the_end_and_mirrors_the_exit_code(
    call: Call, monkeypatch: pytest.MonkeyPatch, end: dict[str, Any], code: int
) -> None:
    running(monkeypatch, *STEPS, {"step": 8, **end})
    found, out, err = call("watch", "a-run")
    assert (found, err) == (code, "")
    lines = out.splitlines()
    assert lines[:2] == [
        "STARTING  step 0/40  waits for room on the cluster",
        "RUNNING  step 7/40  loss 0.1234  kept 50.0%  accuracy 71.0%",
    ]
    assert lines[2:4] == ["", f"{end['state'].value} after step 8/40"]  # nothing is said twice
    assert end.get("error", "") in out


def test_watch_of_an_ended_run_says_so_at_once(call: Call) -> None:
    made_run("runs", "a-run")
    (Path("runs") / "a-run" / "report.html").write_text("")
    code, out, _ = call("watch", "a-run")
    assert code == 0
    assert "SUCCEEDED after step 12/12" in out
    assert "runs/a-run/report.html" in out


def test_watch_gives_up_a_run_whose_driver_is_lost(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = {"state": RunState.RUNNING, "heartbeat_at": time.time() - 60}
    running(monkeypatch, silent, {**silent, "heartbeat_at": time.time() - 300})
    code, out, err = call("watch", "a-run")
    assert code == 1
    assert out.splitlines() == [
        "RUNNING, stale  step 0/40",
        "RUNNING, lost  step 0/40",
    ]
    assert err.startswith("error: a-run: no sign of life for 5 min")
    assert "--run-id a-run" in err


def test_watch_on_a_terminal_shows_the_status_in_place(
    terminal: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(monkeypatch, *STEPS, {"state": RunState.SUCCEEDED, "step": 8})
    code, out, _ = terminal("watch", "a-run")
    assert code == 0
    assert "\x1b[2K" in out  # the rows before are taken away
    assert "71.0%" in out
    assert "SUCCEEDED" in out


@pytest.mark.parametrize("command", ["watch", "logs"])
def test_a_run_that_is_not_there(call: Call, command: str) -> None:
    code, _, err = call(command, "absent")
    assert code == 3
    assert "no run 'absent' under runs" in err


def test_logs_are_the_drivers_and_cannot_drive_the_terminal(call: Call) -> None:
    directory = made_run("runs", "a-run")
    code, out, err = call("logs", "a-run")
    assert (code, out) == (3, "")
    assert err == "error: a-run: no log yet; see `tip-ray status`\n"
    directory.storage.write(LOG, b"first line\nsecond \x1b[2J line\n")
    assert call("logs", "a-run") == (0, "first line\nsecond \\x1b[2J line\n", "")


def plain_lines(out: str) -> list[str]:
    return _STYLE.sub("", out).splitlines()


def test_tables_fit_a_narrow_terminal_and_say_what_they_leave_out(terminal: Call) -> None:
    made_run("runs", "a-run")
    code, out, _ = terminal("metrics", "a-run")
    assert code == 0
    lines = plain_lines(out)
    assert max(map(len, lines)) <= COLUMNS
    assert lines[0].split()[:3] == ["step", "loss", "kept"]
    rows = [line.split() for line in lines[1:13]]
    assert [row[0] for row in rows] == [str(step) for step in range(1, 13)]  # one line a row
    assert "not shown: " in out
    assert "csv" in out
    assert "\x1b[" in out


def test_wide_terminals_leave_nothing_out(terminal: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    made_run("runs", "a-run")
    out = terminal("metrics", "a-run")[1]
    assert "not shown" not in out
    assert "grad norm" in out


def test_list_and_status_fit_a_narrow_terminal(terminal: Call) -> None:
    directory = made_run("runs", "a-run")
    failed = made_status(
        "a-run", state=RunState.FAILED, error="faults.max_learner_restarts: " + "word " * 30
    )
    directory.write_status(failed)
    for command in (("list",), ("status", "a-run")):
        code, out, _ = terminal(*command)
        assert code == 0
        assert max(map(len, plain_lines(out))) <= COLUMNS
        assert "a-run" in out
        assert "\x1b[" in out
    assert " ".join(" ".join(plain_lines(out)).split()).count("word") == 30


def test_samples_mark_kept_tokens_by_colour_and_by_a_sign(terminal: Call) -> None:
    directory = made_run("runs", "a-run")
    directory.write_samples(3, made_samples(3, [["7", "+", "8", "\n", "9"]]))
    code, out, _ = terminal("samples", "a-run", "--step", "3")
    assert code == 0
    kept = re.findall(r"\x1b\[[0-9;]*43m(.*?)\x1b\[0m", out)
    assert kept == ["[+]", "[\\n]"]
    assert "7[+]8[\\n]" in plain_lines(out)
    assert plain_lines(out)[-1] == "9"


@pytest.mark.parametrize("command", ["status", "list", "metrics", "samples"])
def test_no_colour_in_a_pipe(call: Call, command: str) -> None:
    made_run("runs", "a-run")
    code, out, _ = call(command, *([] if command == "list" else ["a-run"]))
    assert code == 0
    assert "\x1b" not in out


def test_no_color_is_heard(terminal: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    directory = made_run("runs", "a-run")
    directory.write_samples(3, made_samples(3, [["7", "+"]]))
    out = terminal("samples", "a-run", "--step", "3")[1]
    assert "7[+]" in plain_lines(out)  # the sign stays
    assert not re.search(r"\x1b\[[0-9;]*4?3[0-7]", out)
