"""eval and export: their arguments, and both on one real run of two learner ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.runs_made import QUICKSTART, made_evaluation, made_run
from tip_ray.cli import main
from tip_ray.contract.run_state import EvaluationResult
from tip_ray.contract.spec import RunSpec
from tip_ray.control import evaluate_alone
from tip_ray.control.run_reader import RunReader

STEPS = 2
SETTINGS = {
    "steps": STEPS,
    "rollout.engine": "transformers",
    "learner.replicas": 2,
    "learner.lr": 1.0e-3,
    "prompts.prompts_per_step": 8,
    "checkpoint.every_steps": 1,
    "evaluation.0.every_steps": 1,
    "evaluation.0.limit": 48,
}
OPTIONS = [f"--set={name}={value}" for name, value in SETTINGS.items()]

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
    return lines[0]


def alone(*argv: object) -> str:
    """One command in a process of its own, since it starts a Ray of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tip_ray.cli", *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Ended:
    root: Path
    reader: RunReader

    def results(self, step: int) -> dict[str, Any]:
        """What the run itself measured after `step`, but for the time it took."""
        found = {one.step: one for one in self.reader.read_evaluations()}
        return found[step].model_dump(exclude={"seconds"})


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    root = tmp_path_factory.mktemp("runs")
    alone("run", QUICKSTART, *OPTIONS, "--run-root", root, "--run-id", "a-run")
    return Ended(root, RunReader(str(root / "a-run")))


def test_the_last_checkpoint_is_the_runs_own_export_bit_for_bit(call: Call, ended: Ended) -> None:
    code, out, err = call("export", "a-run", "--run-root", ended.root, "--output", "mine")
    assert (code, out, err) == (0, f"a-run after step {STEPS}: mine\n", "")
    own = Path(ended.reader.url) / "export"
    names = sorted(path.name for path in own.iterdir())
    assert sorted(path.name for path in Path("mine").iterdir()) == names
    for name in names:
        assert (Path("mine") / name).read_bytes() == (own / name).read_bytes(), name


def test_an_earlier_step_is_another_model(call: Call, ended: Ended) -> None:
    assert call("export", ended.reader.url, "--step", 1, "--output", "earlier")[0] == 0
    own = Path(ended.reader.url) / "export" / "model.safetensors"
    assert (Path("earlier") / "model.safetensors").read_bytes() != own.read_bytes()


def test_evaluation_alone_is_that_of_the_run(ended: Ended) -> None:
    """Greedy answers to the same problems, by the weights of a checkpoint."""
    arguments = ("--run", "a-run", "--run-root", ended.root, "--step", 1, "--json")
    results = json.loads(alone("eval", QUICKSTART, *OPTIONS, *arguments))
    assert [one.pop("seconds") > 0 for one in results] == [True]
    assert results == [ended.results(1)]
    for other in (0, STEPS):  # the weights of another step would show
        assert results != [ended.results(other) | {"step": 1}]


class FakeEvaluation:
    """Stands for the evaluation, and remembers what it was asked."""

    def __init__(self) -> None:
        self.spec: RunSpec | None = None

    def __call__(self, spec: RunSpec, step: int) -> list[EvaluationResult]:
        self.spec = spec
        return [made_evaluation(step, 0.75)]


def test_eval_of_a_model(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEvaluation()
    monkeypatch.setattr(evaluate_alone, "evaluate_alone", fake)
    code, out, err = call("eval", QUICKSTART, "--model", "some/model", "--set", "seed=7")
    assert (code, err) == (0, "")
    header, row = out.splitlines()
    assert header.split()[:3] == ["EVALUATION", "MEAN", "+-"]
    assert row.split()[:4] == ["carry", "75.0%", "3.0%", "256"]
    assert fake.spec is not None
    assert (fake.spec.student.model, fake.spec.seed) == ("some/model", 7)
    data = json.loads(call("eval", QUICKSTART, "--model", "some/model", "--json")[1])
    assert (data[0]["mean"], data[0]["step"]) == (0.75, 0)


def test_eval_of_a_run_is_of_its_export(
    call: Call, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeEvaluation()
    monkeypatch.setattr(evaluate_alone, "evaluate_alone", fake)
    data = json.loads(call("eval", QUICKSTART, "--run", ended.reader.url, "--json")[1])
    assert fake.spec is not None
    assert fake.spec.student.model == f"{ended.reader.url}/export"
    assert data[0]["step"] == STEPS


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ([QUICKSTART], 2, "--help"),
        ([QUICKSTART, "--model", "a", "--run", "b"], 2, "--help"),
        ([QUICKSTART, "--model", "a", "--step", "3"], 2, "--step: found 3, expected --run RUN"),
        ([QUICKSTART, "--model", "absent/model"], 2, "student.model"),
        ([QUICKSTART, "--run", "absent"], 3, "no run 'absent' under runs"),
        ([QUICKSTART, "--run", "made", "--step", "3"], 3, "no checkpoint after step 3"),
        ([QUICKSTART, "--run", "made"], 3, "no checkpoint that is whole"),
        ([QUICKSTART, "--model", "a", "--set", "evaluation=[]"], 2, "evaluation: found an empty"),
        (["absent.yaml", "--model", "a"], 2, "absent.yaml: found no such file"),
    ],
)
def test_eval_refuses_before_anything_starts(
    call: Call, argv: list[Any], code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_run("runs", "made")
    monkeypatch.setattr(evaluate_alone, "connected", None)  # reaching Ray would be exit 1
    assert says in refused(call("eval", *argv), code)


def test_export_never_writes_over_anything(call: Call, ended: Ended) -> None:
    Path("used").mkdir()
    (Path("used") / "precious").touch()
    Path("file").touch()
    for output in ("used", "file", "."):
        line = refused(call("export", ended.reader.url, "--output", output), 2)
        assert "--output" in line
        assert "which holds something" in line
    assert [path.name for path in Path("used").iterdir()] == ["precious"]
    assert call("export", ended.reader.url, "--output", "new/place")[0] == 0
    assert refused(call("export", "absent", "--output", "other"), 3)
    assert "--help" in refused(call("export", ended.reader.url), 2)


def test_export_says_where_nothing_can_be_written(call: Call, ended: Ended) -> None:
    line = refused(call("export", ended.reader.url, "--output", "/proc/nowhere"), 2)
    assert "/proc/nowhere" in line
