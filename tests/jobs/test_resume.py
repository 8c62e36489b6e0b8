"""Runs that are killed, frozen, cancelled and gone on with: they equal one that was left alone."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.jobs.harness import Crew, quickstart
from tests.jobs.resuming import (
    CrashedError,
    CrashingAfter,
    assert_same_run,
    drive,
    metrics_of,
    tree,
    with_another_learner,
)
from tip_ray.cli import main
from tip_ray.contract.errors import NotFoundError, RunCancelledError, SpecError
from tip_ray.contract.run_state import RunState
from tip_ray.contract.spec import RunSpec
from tip_ray.control import lease, run_directory
from tip_ray.control.checkpoint import Checkpoints
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import dump_spec
from tip_ray.stages.state import read_parameters

STEPS, ENDLESS = 6, 100_000
KILL_SEED = int(os.environ.get("TIP_TEST_KILL_SEED", "3"))
START_S = 400  # for a machine that does much else


def spec_in(root: Path, **overrides: Any) -> RunSpec:
    """Small steps on two learner ranks; a constant rate, so that `steps` changes no update."""
    small = {
        "run_root": str(root),
        "steps": STEPS,
        "max_lag": 0,
        "rollout__engine": "transformers",
        "prompts__prompts_per_step": 4,
        "checkpoint": {"every_steps": 2, "keep": 3},
        "learner__replicas": 2,
        "learner__schedule": "constant",
        "samples_per_step": 2,
        "evaluation__0__limit": 8,
        "evaluation__0__every_steps": 3,
    }
    return quickstart(**{**small, **overrides})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def crew(ray_cluster: None, root: Path) -> Iterator[Crew]:
    started = Crew.start(spec_in(root))
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(crew: Crew, root: Path) -> RunReader:
    """The run that was left alone."""
    return drive(crew, spec_in(root), "left-alone")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drivers that are taken over here are known to be dead or frozen."""
    monkeypatch.setattr(lease, "_WATCH_S", 0.6)


@contextmanager
def driver_process(root: Path, run_id: str) -> Iterator[subprocess.Popen[str]]:
    """`tip-ray run` in a process of its own, which would not end by itself, on the test's Ray."""
    spec = root / f"{run_id}.yaml"
    spec.write_text(dump_spec(spec_in(root, steps=ENDLESS)))
    command = [sys.executable, "-m", "tip_ray.cli", "run", str(spec), "--run-id", run_id]
    process = subprocess.Popen(
        [*command, "--ray-address", ray.get_runtime_context().gcs_address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_step(process: subprocess.Popen[str], reader: RunReader, steps: range) -> None:
    """Until one of `steps` is the newest."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            if reader.read_status().step in steps:
                return
        except NotFoundError:
            pass
        time.sleep(0.01)
    raise AssertionError(f"none of {steps} within {START_S} s")


def test_killed_at_a_random_moment_and_resumed(crew: Crew, root: Path, whole: RunReader) -> None:
    chance = random.Random(KILL_SEED)
    reader = RunReader(str(root / "killed"))
    with driver_process(root, "killed") as process:
        wait_for_step(process, reader, range(chance.randint(1, STEPS - 2), ENDLESS))
        time.sleep(chance.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = reader.read_status()
    assert not killed.state.ended
    assert_same_run(drive(crew, spec_in(root), "killed"), whole)
    assert reader.read_status().epoch == 2


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_crash_between_checkpoints(
    crew: Crew, root: Path, whole: RunReader, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and samples beyond the checkpoint are replaced, those in merged parts too."""
    monkeypatch.setattr(run_directory, "MERGE_STEPS", 3)
    run_id = f"crashed-{step}"
    with pytest.raises(CrashedError):
        drive(crew, spec_in(root), run_id, progress=CrashingAfter(step))
    broken_off = RunReader(str(root / run_id))
    assert broken_off.read_metrics().num_rows == step
    assert broken_off.storage.exists("metrics/steps-00000001-00000003.parquet") == (step >= 3)
    assert_same_run(drive(crew, spec_in(root), run_id), whole)


def test_a_broken_checkpoint_costs_steps_not_the_run(
    crew: Crew, root: Path, whole: RunReader
) -> None:
    with pytest.raises(CrashedError):
        drive(crew, spec_in(root), "damaged", progress=CrashingAfter(5))
    shard = next((root / "damaged" / "checkpoints" / "step-00000004").glob("learner-00001*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    reader = drive(crew, spec_in(root), "damaged")
    assert_same_run(reader, whole)
    skipped = [one for one in reader.read_events() if one["kind"] == "checkpoint_skipped"]
    assert [one["reason"] for one in skipped] == [
        "checkpoint after step 4 is skipped: checkpoints/step-00000004/"
        "learner-00001-of-00002.safetensors: its SHA-256 is not the manifest's"
    ]


def test_cancelled_and_resumed_with_more_steps(crew: Crew, root: Path, whole: RunReader) -> None:
    with pytest.raises(RunCancelledError, match="after step 1"):
        drive(crew, spec_in(root, steps=4), "cancelled", cancel=True)
    stopped = RunReader(str(root / "cancelled"))
    assert Checkpoints(stopped.storage, keep=3).steps() == [1]
    assert stopped.read_status().state is RunState.CANCELLED
    resumed = drive(crew, spec_in(root, checkpoint={"every_steps": 2, "keep": 3}), "cancelled")
    assert_same_run(resumed, whole)


def test_two_ranks_then_one(crew: Crew, root: Path, whole: RunReader) -> None:
    with pytest.raises(RunCancelledError):
        drive(crew, spec_in(root), "narrower", cancel=True)
    spec = spec_in(root, steps=2, learner__replicas=1)
    alone = with_another_learner(crew, spec)
    try:
        reader = drive(alone, spec, "narrower")
    finally:
        alone.stages.selector.close()
        alone.stages.learner.close()
    expected = metrics_of(whole)[1]
    found = metrics_of(reader)[1]
    for name in ("loss", "grad_norm", "student_entropy_mean", "reverse_kl_mean", "tokens_kept"):
        assert found[name] == pytest.approx(expected[name], rel=2e-3), name
    urls = [f"{one.url}/checkpoints/step-00000002" for one in (reader, whole)]
    mine, theirs = (dict(read_parameters(url)) for url in urls)
    # Rows are packed into other micro-batches, so bfloat16 rounds otherwise; AdamW turns that into
    # up to twice the rate where a gradient is next to nothing. Lost moments would move all of them.
    gaps = torch.cat([(mine[name] - theirs[name]).abs().flatten() for name in theirs])
    assert gaps.max() < 2 * spec.learner.lr
    assert gaps.mean() < 0.05 * spec.learner.lr


def test_fewer_steps_than_are_trained_are_refused(crew: Crew, root: Path, whole: RunReader) -> None:
    with pytest.raises(CrashedError):
        drive(crew, spec_in(root), "shorter", progress=CrashingAfter(3))
    expected = "steps: found 1, expected at least 2: so many are trained; raise it"
    with pytest.raises(SpecError, match=re.escape(expected)):
        drive(crew, spec_in(root, steps=1), "shorter")


def test_a_second_driver_and_a_frozen_first(
    crew: Crew,
    root: Path,
    whole: RunReader,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = RunReader(str(root / "frozen"))
    with driver_process(root, "frozen") as first:
        wait_for_step(first, reader, range(1, ENDLESS))
        with monkeypatch.context() as patient:
            patient.setattr(lease, "_WATCH_S", 30)
            assert main(["run", str(root / "frozen.yaml"), "--run-id", "frozen"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {reader.url}: another driver is at this run (epoch 1, ")
        assert error.count("\n") == 1
        # After an odd step no checkpoint is written: the driver is frozen between two writes.
        wait_for_step(first, reader, range(reader.read_status().step + 1 | 1, ENDLESS, 2))
        first.send_signal(signal.SIGSTOP)
        steps = max(STEPS, reader.read_status().step + 1)
        taken_over = drive(crew, spec_in(root, steps=steps), "frozen")
        before = tree(root / "frozen")
        first.send_signal(signal.SIGCONT)
        _, error = first.communicate(timeout=60)
    assert first.returncode == 2
    assert error == (
        f"error: {reader.url}: taken over by another driver (epoch 2, this one is of 1); let that "
        f"one go on\n"
    )
    assert tree(root / "frozen") == before
    assert taken_over.read_status().state is RunState.SUCCEEDED
    assert metrics_of(taken_over)[:STEPS] == metrics_of(whole)
    if steps == STEPS:
        assert_same_run(taken_over, whole)
