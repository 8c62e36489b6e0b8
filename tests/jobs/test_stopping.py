"""SIGTERM, SIGINT and `cancel` on a real run: status, exit code, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.jobs.harness import QUICKSTART
from tip_ray.cli import main
from tip_ray.contract.errors import NotFoundError
from tip_ray.contract.run_state import RunState, RunStatus
from tip_ray.control.run_reader import RunReader

ENDLESS = [
    "--set=steps=100000",
    "--set=rollout.engine=transformers",
    "--set=prompts.prompts_per_step=4",
    "--set=evaluation=[]",
]
START_S = 180  # Ray's first start on a machine can take a minute and more


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], RunReader]]:
    """A run that has trained at least one step."""
    command = [sys.executable, "-m", "tip_ray.cli", "run", str(QUICKSTART), *ENDLESS]
    process = subprocess.Popen(
        [*command, "--run-id", "endless", "--run-root", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
    )
    reader = RunReader(str(tmp_path / "endless"))
    try:
        _wait_for_step(process, reader, 1)
        yield process, reader
    finally:
        process.kill()
        process.wait()


def _wait_for_step(process: subprocess.Popen[str], reader: RunReader, step: int) -> RunStatus:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        try:
            status = reader.read_status()
        except NotFoundError:
            pass
        else:
            if status.step >= step:
                return status
        time.sleep(0.2)
    raise AssertionError(f"no step {step} within {START_S} s")


def _offspring(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("signum", "code", "state"),
    [(signal.SIGTERM, 143, RunState.FAILED), (signal.SIGINT, 130, RunState.CANCELLED)],
)
def test_signals(running: tuple, signum: signal.Signals, code: int, state: RunState) -> None:
    process, reader = running
    offspring = _offspring(process)
    assert offspring
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    status = reader.read_status()
    assert status.state is state
    assert signum.name in (status.error or "")
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(offspring, timeout=20)
    assert alive == []


def test_cancel_ends_after_the_step(running: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    process, reader = running
    assert main(["cancel", reader.url]) == 0
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    status = reader.read_status()
    assert status.state is RunState.CANCELLED
    assert reader.read_metrics().column("step").to_pylist() == list(range(1, status.step + 1))


def test_a_run_never_moves_to_a_cluster_that_cannot_hold_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "tip_ray.cli", "run", str(QUICKSTART), "--run-id", "big"]
    options = ["--run-root", str(tmp_path), "--set", "learner.num_gpus=1"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=START_S, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: learner: a replica needs 1 CPU, 1 GPU")
    assert done.stderr.count("\n") == 1
    assert RunReader(str(tmp_path / "big")).read_status().state is RunState.FAILED
