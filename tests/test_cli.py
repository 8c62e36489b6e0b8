"""The command line from the outside: what is printed, where, and the exit code."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs_made import QUICKSTART, made_run, made_samples, made_status
from tip_ray import __version__
from tip_ray.cli import main
from tip_ray.contract.errors import RunFailedError, TipRayError
from tip_ray.contract.run_state import RunState, RunStatus
from tip_ray.contract.spec import RunSpec
from tip_ray.control import driver
from tip_ray.control.progress import Progress
from tip_ray.control.run_directory import RunDirectory, is_run_id
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import load_spec

Outcome = tuple[int, str, str]
Call = Callable[..., Outcome]


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Call:
    """Runs one command in an empty directory; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIP_RAY_RUN_ROOT", raising=False)

    def run(*argv: object) -> Outcome:
        try:
            code = main([str(one) for one in argv])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def refused(outcome: Outcome, code: int) -> str:
    """The one line on stderr of a command that failed."""
    assert outcome[0] == code
    lines = outcome[2].splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome[1]
    return lines[0]


def test_version_and_help(call: Call) -> None:
    assert call("--version") == (0, f"tip-ray {__version__}\n", "")
    code, out, _ = call("--help")
    assert code == 0
    commands = ("init", "run", "validate", "schema", "status", "list", "metrics", "samples")
    for command in (*commands, "report", "cancel"):
        assert f"    {command} " in out
    code, _, err = call()
    assert code == 2
    assert "usage: tip-ray" in err


@pytest.mark.parametrize(
    "argv",
    [
        ["fly"],
        ["run"],
        ["run", "spec.yaml", "--sett", "a=b"],
        ["status"],
        ["metrics", "a-run", "--format", "xml"],
        ["samples", "a-run", "--step", "first"],
        ["init", "chess"],
    ],
)
def test_wrong_arguments_are_one_line(call: Call, argv: list[str]) -> None:
    assert "--help" in refused(call(*argv), 2)


@pytest.mark.parametrize("kind", ["quickstart", "gsm8k", "math"])
def test_init_writes_a_spec_and_never_over_a_file(call: Call, kind: str) -> None:
    code, out, _ = call("init", kind)
    assert code == 0
    assert f"tip-ray run {kind}.yaml" in out
    assert load_spec(f"{kind}.yaml").steps > 0
    before = Path(f"{kind}.yaml").read_text()
    assert "exists" in refused(call("init", kind), 2)
    assert Path(f"{kind}.yaml").read_text() == before
    assert call("init", kind, "mine.yaml")[0] == 0
    assert Path("mine.yaml").read_text() == before
    assert "cannot be written" in refused(call("init", kind, "absent/mine.yaml"), 2)


def test_init_takes_the_quickstart_by_default(call: Call) -> None:
    assert call("init")[0] == 0
    assert Path("quickstart.yaml").read_text() == QUICKSTART.read_text()


def test_schema_is_that_of_the_spec(call: Call) -> None:
    code, out, _ = call("schema")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(RunSpec.model_json_schema()))


@pytest.mark.parametrize("command", [["validate"], ["run", "--dry-run"]])
def test_validate_shows_what_differs_and_the_plan(call: Call, command: list[str]) -> None:
    code, out, _ = call(
        *command, QUICKSTART, "--set", "selection.retention=0.25", "--set", "rollout.replicas=2"
    )
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["selection.retention", "0.25", "0.5"] in lines
    assert ["rollout", "2", "2", "0"] in lines
    # 15 ids in the vocabulary: 4 + 0.25 (20 + 8 * 15), and with every token kept
    assert ["cut", "->", "learner", "39", "144", "234.0", "KiB"] in lines
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["absent.yaml"], "absent.yaml: found no such file"),
        ([QUICKSTART, "--set", "learner.lrr=1"], "did you mean lr?"),
        ([QUICKSTART, "--set", "steps=0"], "steps: found 0"),
        ([QUICKSTART, "--set", "steps"], "path=value"),
        ([QUICKSTART, "--set", "prompts.source=absent.jsonl"], "absent.jsonl"),
        ([QUICKSTART, "--set", "student.model=demo:absent"], "demo:absent"),
        ([QUICKSTART, "--run-id", "a/b"], "--run-id"),
        ([QUICKSTART, "--run-id", ""], "--run-id"),
        ([QUICKSTART, "--run-root", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_run_refuses_bad_input_before_anything_starts(
    call: Call, argv: list[Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "connected", None)  # reaching Ray would be a TypeError, exit 1
    assert says in refused(call("run", *argv), 2)
    assert not list(Path.cwd().iterdir())


class FakeDriver:
    """Stands for the driver: a run of no steps that ends as it is told."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.seen: dict[str, Any] = {}

    def run(
        self,
        spec: RunSpec,
        run_id: str | None = None,
        *,
        ray_address: str | None = None,
        progress: Progress,
        finish: Callable[[RunDirectory], None],
    ) -> RunStatus:
        assert run_id is not None
        self.seen = {"spec": spec, "ray_address": ray_address}
        directory = made_run(spec.run_root, run_id, steps=2)
        progress.message("the driver speaks")
        if self.error is not None:
            failed = made_status(run_id, step=2, state=RunState.FAILED, error=str(self.error))
            directory.write_status(failed)
            raise self.error
        finish(directory)
        return made_status(run_id, state=RunState.SUCCEEDED)


def test_run_prints_its_id_first_and_ends_with_the_report(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeDriver()
    monkeypatch.setattr(driver, "run", fake.run)
    code, out, err = call(
        *("run", QUICKSTART, "--run-root", "there", "--set", "seed=7", "--ray-address", "ray-head")
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert is_run_id(lines[0])
    assert lines[1] == "the driver speaks"
    assert "42.0% before, 95.0% after" in out
    assert (Path("there") / lines[0] / "report.html").exists()
    assert f"there/{lines[0]}/report.html" in out
    assert fake.seen["spec"].seed == 7
    assert fake.seen["spec"].run_root == str(Path.cwd() / "there")
    assert fake.seen["ray_address"] == "ray-head"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunFailedError("a replica died"), 1, "error: a replica died"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_a_failed_run_says_why_and_leaves_a_report(
    call: Call, error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "run", FakeDriver(error).run)
    outcome = call("run", QUICKSTART, "--run-id", "a-run")
    assert refused(outcome, code) == line
    assert outcome[1].splitlines()[0] == "a-run"
    assert "FAILED after step 2/40" in outcome[1]
    assert Path("runs/a-run/report.html").exists()


def test_a_run_that_has_succeeded_is_left_as_it_is(call: Call) -> None:
    directory = made_run("runs", "a-run", steps=40)
    before = RunReader(directory.url).read_status()
    code, out, _ = call("run", QUICKSTART, "--run-id", "a-run")
    assert code == 0
    assert "nothing to do" in out
    assert "after step" not in out  # no summary: nothing was run
    assert RunReader(directory.url).read_status() == before


def test_a_resume_with_another_spec_is_refused(call: Call) -> None:
    directory = made_run("runs", "a-run", steps=40)
    failed = made_status("a-run", state=RunState.FAILED, step=3)
    directory.write_status(failed)
    outcome = call("run", QUICKSTART, "--run-id", "a-run", "--set", "seed=9")
    assert "seed: found 9, expected 0 as the run was begun" in refused(outcome, 2)
    assert RunReader(directory.url).read_status() == failed


def test_a_bug_is_one_line_and_a_traceback_with_debug(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "run", FakeDriver(ZeroDivisionError("by\nzero")).run)
    line = refused(call("run", QUICKSTART, "--run-id", "first"), 1)
    assert line == "error: ZeroDivisionError: by zero; --debug shows where"
    for number, argv in enumerate((["--debug", "run"], ["run", "--debug"])):
        code, _, err = call(*argv, QUICKSTART, "--run-id", f"debug-{number}")
        assert code == 1
        assert "Traceback" in err
        assert err.splitlines()[-1] == line


def test_status_for_people_and_as_json(call: Call) -> None:
    made_run("runs", "a-run")
    code, out, _ = call("status", "a-run")
    assert code == 0
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert shown["state"] == "SUCCEEDED"
    assert shown["step"] == "12/12"
    assert shown["accuracy"] == "95.0% (42.0% at first)"
    assert shown["directory"] == "runs/a-run"
    data = json.loads(call("status", "a-run", "--json")[1])
    assert data["accuracy"] == 0.95
    assert data["health"] == "ended"
    assert 0 <= data["heartbeat_age_s"] < 60
    assert RunStatus.model_validate(data).state is RunState.SUCCEEDED


def test_a_silent_run_is_not_shown_as_running(call: Call) -> None:
    directory = RunDirectory.create("runs", "a-run", load_spec(QUICKSTART))
    silent = made_status("a-run", state=RunState.RUNNING, heartbeat_at=time.time() - 3700)
    directory.write_status(silent)
    assert "RUNNING, lost: no sign of life for 1 h 01 min" in call("status", "a-run")[1]
    assert json.loads(call("status", "a-run", "--json")[1])["health"] == "lost"
    assert "RUNNING, lost" in call("list")[1]


def test_an_error_in_a_status_cannot_drive_the_terminal(call: Call) -> None:
    directory = RunDirectory.create("runs", "a-run", load_spec(QUICKSTART))
    directory.write_status(made_status("a-run", state=RunState.FAILED, error="\x1b[2Jgone"))
    assert "\\x1b[2Jgone" in call("status", "a-run")[1]


def test_list_is_plain_in_a_pipe_and_newest_first(call: Call) -> None:
    code, out, err = call("list")
    assert (code, out) == (0, "")
    assert "no runs under runs" in err
    made_run("runs", "older")
    time.sleep(0.01)
    made_run("runs", "newer-" + "x" * 30)
    (Path("runs") / "older" / "status.json").read_text()
    lines = call("list")[1].splitlines()
    assert lines[0].split()[:2] == ["RUN", "STATE"]
    assert [line.split()[0] for line in lines[1:]] == ["newer-" + "x" * 30, "older"]
    assert lines[1].split()[1:5] == ["SUCCEEDED", "12/12", "95.0%", "50.0%"]
    (Path("runs") / "older" / "status.json").write_text("{")
    code, out, err = call("list")
    assert (code, len(out.splitlines())) == (0, 2)
    assert err.startswith("warning: ")


@pytest.mark.parametrize("command", ["status", "metrics", "samples", "report", "cancel"])
def test_a_run_that_is_not_there_is_exit_code_3(call: Call, command: str) -> None:
    assert "no run 'absent' under runs" in refused(call(command, "absent"), 3)
    assert "tip-ray list" in refused(call(command, "absent", "--run-root", "elsewhere"), 3)


def test_metrics_as_table_csv_and_json(call: Call) -> None:
    made_run("runs", "a-run")

    def printed(*argv: str) -> str:
        code, out, _ = call("metrics", "a-run", *argv)
        assert code == 0
        return out

    table = printed().splitlines()
    assert table[0].split()[:3] == ["step", "loss", "kept"]
    assert len(table) == 13
    rows = list(csv.DictReader(io.StringIO(printed("--format", "csv"))))
    data = json.loads(printed("--format", "json"))
    assert [int(row["step"]) for row in rows] == [row["step"] for row in data] == list(range(1, 13))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in data]


def test_samples_show_which_tokens_were_kept(call: Call) -> None:
    directory = made_run("runs", "a-run")
    directory.write_samples(3, made_samples(3, [["7", "+", "8", "\x1b[31m"]]))
    code, out, _ = call("samples", "a-run", "--step", "3")
    assert code == 0
    assert "step 3, prompt 0, sample 0: 2 of 4 tokens kept" in out
    assert "27+18=\n7[+]8[\\x1b[31m]" in out
    assert "step 12, prompt 0" in call("samples", "a-run")[1]  # the newest
    assert "no samples of step 4" in refused(call("samples", "a-run", "--step", "4"), 3)


def test_report_of_one_run_and_of_several(call: Call) -> None:
    made_run("runs", "one")
    made_run("runs", "two")
    assert call("report", "one") == (0, "runs/one/report.html\n", "")
    assert call("report", "runs/one", "two", "--output", "both.html")[1] == "both.html\n"
    assert "2 runs" in Path("both.html").read_text()[:2000]


def test_cancel_asks_once_and_leaves_ended_runs_alone(call: Call) -> None:
    directory = RunDirectory.create("runs", "a-run", load_spec(QUICKSTART))
    directory.write_status(made_status("a-run", state=RunState.RUNNING))
    assert call("cancel", "a-run")[0] == 0
    assert directory.cancel_requested()
    directory.clear_cancel()
    directory.write_status(made_status("a-run", state=RunState.FAILED))
    assert "has ended already: FAILED" in call("cancel", "a-run")[1]
    assert not directory.cancel_requested()


def test_the_root_of_runs_comes_from_the_variable(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_run(tmp_path / "base", "direct")
    made_run(tmp_path / "base" / "runs", "under-the-default")
    monkeypatch.setenv("TIP_RAY_RUN_ROOT", str(tmp_path / "base"))
    for run in ("direct", "under-the-default"):
        assert call("status", run)[0] == 0
    assert len(call("list")[1].splitlines()) == 3


def test_a_reader_of_the_pipe_that_goes_is_no_error() -> None:
    command = f"{sys.executable} -m tip_ray.cli schema | true; echo ${{PIPESTATUS[0]}}"
    root = QUICKSTART.parents[1]
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=root)
    assert (done.stderr, done.stdout) == ("", "0\n")


def test_every_error_of_ours_has_an_exit_code_of_the_interface() -> None:
    def below(kind: type[TipRayError]) -> set[int]:
        return {kind.exit_code}.union(*(below(one) for one in kind.__subclasses__()))

    assert below(TipRayError) == {1, 2, 3, 130, 143}
