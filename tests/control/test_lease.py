"""Who may drive a run: leases between real directories, threads and processes; no Ray."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.control.racing import race
from tests.control.test_checkpoint import Ranks, manifest_of
from tests.runs_made import (
    QUICKSTART,
    made_evaluation,
    made_metrics,
    made_run,
    made_samples,
    made_status,
)
from tip_ray.cli import main
from tip_ray.contract.errors import LeaseLostError, RunDirectoryError, SpecError
from tip_ray.contract.run_state import RunState, RunStatus
from tip_ray.control import driver, lease
from tip_ray.control.checkpoint import Checkpoints
from tip_ray.control.lease import Lease, begin, take_over
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import load_spec

RACES = 5


def spec_in(root: Path, **overrides: Any):
    return load_spec(QUICKSTART, {"run_root": str(root), **overrides})


def tree(place: Path) -> dict[str, str]:
    """Every file's digest."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def driven(root: Path, run_id: str = "a-run", **status: Any) -> Lease:
    """A run that a driver has begun; its status as given."""
    held = begin(spec_in(root), run_id)
    held = Lease(held.directory, held.status.model_copy(update=status))
    held.claim(spec_in(root))
    return held


@contextmanager
def beating(held: Lease) -> Iterator[None]:
    """A driver that is alive."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.2):
            now = time.time()
            held.directory.write_status(held.status.model_copy(update={"heartbeat_at": now}))

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()


def test_a_new_run_begins_in_epoch_1(tmp_path: Path) -> None:
    assert take_over(spec_in(tmp_path), "a-run") is None
    driven(tmp_path)
    assert RunReader(str(tmp_path / "a-run")).read_status().epoch == 1


def test_a_second_driver_is_refused_while_the_first_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = driven(tmp_path, state=RunState.RUNNING, step=3)
    spec_before = (tmp_path / "a-run" / "spec.yaml").read_bytes()
    with beating(held):
        command = ["run", str(QUICKSTART), "--run-id", "a-run", "--run-root", str(tmp_path)]
        assert main(command) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/a-run: another driver is at this run (epoch 1, its heartbeat moves); "
        f"wait for it, or `tip-ray cancel a-run`\n"
    )
    status = RunReader(str(tmp_path / "a-run")).read_status()
    assert (status.epoch, status.driver, status.step) == (1, held.status.driver, 3)
    assert (tmp_path / "a-run" / "spec.yaml").read_bytes() == spec_before


@pytest.mark.parametrize("state", [RunState.STARTING, RunState.RUNNING, RunState.RECOVERING])
def test_a_killed_driver_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: RunState
) -> None:
    monkeypatch.setattr(lease, "_WATCH_S", 0.6)
    old = driven(tmp_path, state=state, step=5)
    found = take_over(spec_in(tmp_path, steps=60), "a-run")
    assert found is not None
    assert (found.status.epoch, found.status.step, found.status.steps) == (2, 5, 60)
    assert found.status.state is RunState.PENDING  # from which STARTING is legal
    assert found.status.driver != old.status.driver
    assert RunReader(str(tmp_path / "a-run")).read_status().epoch == 1  # nothing before the claim


def test_a_heart_that_has_long_stood_still_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = driven(tmp_path, state=RunState.RUNNING)
    silent = held.status.model_copy(update={"heartbeat_at": time.time() - 3600})
    held.directory.write_status(silent)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept for {seconds} s"))
    assert take_over(spec_in(tmp_path), "a-run") is not None


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.CANCELLED])
def test_a_run_that_has_ended_goes_on_at_once(tmp_path: Path, state: RunState) -> None:
    held = driven(tmp_path, state=state, step=7, error="why it ended", exit_code=1)
    held.directory.request_cancel()
    found = take_over(spec_in(tmp_path), "a-run")
    assert found is not None
    found.claim(spec_in(tmp_path))
    status = RunReader(str(tmp_path / "a-run")).read_status()
    assert (status.epoch, status.state, status.error) == (2, RunState.PENDING, None)
    assert status.exit_code is None
    assert not found.directory.cancel_requested()


def test_a_run_that_has_succeeded_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = made_run(tmp_path, "a-run", steps=12)
    before = tree(Path(directory.url))
    command = ["run", str(QUICKSTART), "--run-id", "a-run", "--run-root", str(tmp_path)]
    assert main([*command, "--set", "steps=12"]) == 0
    assert "has succeeded before; nothing to do" in capsys.readouterr().out
    assert tree(Path(directory.url)) == before


def test_a_driver_that_died_before_its_first_word_is_followed(tmp_path: Path) -> None:
    RunDirectory.create(str(tmp_path), "a-run", spec_in(tmp_path))
    found = take_over(spec_in(tmp_path), "a-run")
    assert found is not None
    assert found.status.epoch == 1


def test_another_spec_is_refused_by_the_fields_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driven(tmp_path, state=RunState.FAILED)
    before = tree(tmp_path)
    command = ["run", str(QUICKSTART), "--run-id", "a-run", "--run-root", str(tmp_path)]
    changes = ["--set=learner.lr=0.1", "--set=learner.replicas=2", "--set=selection.retention=0.2"]
    assert main([*command, *changes, "--set=steps=50"]) == 2
    assert capsys.readouterr().err == (
        "error: selection.retention, learner.lr: found 0.2, 0.1, expected 0.5, 0.0003 as the run "
        "was begun; start a new run with another --run-id, or undo the change\n"
    )
    assert tree(tmp_path) == before


def test_what_may_differ_may(tmp_path: Path) -> None:
    driven(tmp_path, state=RunState.FAILED)
    changes: dict[str, Any] = {"steps": 90, "checkpoint": {"every_steps": 3, "keep": 5}}
    changes |= {"evaluation": [], "faults.max_tries": 7}
    changes |= {f"{pool}.replicas": 2 for pool in ("rollout", "teacher", "learner")}
    found = take_over(spec_in(tmp_path, **changes), "a-run")
    assert found is not None
    assert found.status.steps == 90


WRITES: list[Callable[[RunDirectory], object]] = [
    lambda d: d.append_metrics(made_metrics(3)),
    lambda d: d.append_metrics(made_metrics(100)),  # merges
    lambda d: d.write_samples(3, made_samples(3, [["a"]])),
    lambda d: d.write_event("noise", 3),
    lambda d: d.write_evaluation(made_evaluation(3, 0.5)),
    lambda d: d.write_spec(spec_in(Path(d.url).parent, steps=99)),
    lambda d: d.forget_after(0),
    lambda d: d.clear_cancel(),
    lambda d: asyncio.run(Checkpoints(d.storage, 1).save(Ranks(), manifest_of(4), 4)),
    lambda d: Checkpoints(d.storage, 1).clear_unfinished(),
    lambda d: (d.append_log("a last word"), d.flush_log()),
    lambda d: d.write_status(made_status("a-run", state=RunState.RUNNING, driver="old")),
    lambda d: d.check_lease(),
]


def test_a_driver_that_was_taken_over_changes_nothing(tmp_path: Path) -> None:
    old = driven(tmp_path, state=RunState.FAILED)
    old.directory.append_metrics(made_metrics(2))
    asyncio.run(Checkpoints(old.directory.storage, 1).save(Ranks(), manifest_of(4), 4))
    old.directory.storage.write("checkpoints/step-00000006/half", b"")
    found = take_over(spec_in(tmp_path), "a-run")
    assert found is not None
    found.claim(spec_in(tmp_path))
    found.directory.request_cancel()
    before = tree(tmp_path)
    expected = "taken over by another driver .epoch 2, this one is of 1.; let that one go on"
    for write in WRITES:
        with pytest.raises(LeaseLostError, match=expected):
            write(old.directory)
        assert tree(tmp_path) == before
    found.directory.write_event("noise", 3)  # the other one can


def test_whoever_asks_a_run_to_stop_needs_no_lease(tmp_path: Path) -> None:
    held = driven(tmp_path, state=RunState.RUNNING)
    RunDirectory(RunReader(held.directory.url).storage, "a-run").request_cancel()
    assert held.directory.cancel_requested()


def test_of_two_drivers_in_the_same_moment_one_wins(tmp_path: Path) -> None:
    run_ids = [f"{kind}-{number}" for number in range(RACES) for kind in ("new", "failed")]
    for run_id in run_ids:
        if run_id.startswith("failed"):
            driven(tmp_path, run_id, state=RunState.FAILED)
    spawn = multiprocessing.get_context("spawn")
    gate, lost, results = spawn.Barrier(2), spawn.Value("i", 0), spawn.Queue()
    args = (str(QUICKSTART), str(tmp_path), run_ids, gate, lost, results)
    drivers = [spawn.Process(target=race, args=args) for _ in range(2)]
    for one in drivers:
        one.start()
    found = [results.get(timeout=120) for _ in range(2 * len(run_ids))]
    for one in drivers:
        one.join(60)
    for run_id in run_ids:
        mine = [(won, why) for name, won, why in found if name == run_id]
        winners = [won for won, _ in mine if won]
        assert len(winners) == 1, mine
        assert RunReader(str(tmp_path / run_id)).read_status().driver == winners[0]
        why = next(why for _, why in mine if why)
        assert why.startswith(("2 LeaseLostError: ", "2 RunDirectoryError: "))
        assert "\n" not in why


def test_there_are_signs_of_life_while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[float] = []

    class Heart:
        def beat(self) -> None:
            beats.append(time.monotonic())

    @contextmanager
    def slow() -> Iterator[None]:
        deadline = time.monotonic() + 30
        while len(beats) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        yield
        beats.append(-1.0)

    monkeypatch.setattr(driver, "HEARTBEAT_S", 0.02)
    with driver._entered_beating(Heart(), slow()):
        counted = len(beats)
        assert counted >= 3
        time.sleep(0.1)
        assert len(beats) == counted  # from here on the loop's own heart beats
    assert beats[-1] == -1.0  # left as it was entered


def test_a_cluster_that_does_not_come_ends_the_signs_of_life() -> None:
    @contextmanager
    def refused() -> Iterator[None]:
        raise RunDirectoryError("no cluster")
        yield

    threads = threading.active_count()
    with pytest.raises(RunDirectoryError, match="no cluster"):  # noqa: SIM117
        with driver._entered_beating(None, refused()):
            pass
    assert threading.active_count() == threads


def test_a_spec_in_the_run_directory_that_is_broken_is_said_so(tmp_path: Path) -> None:
    driven(tmp_path, state=RunState.FAILED)
    (tmp_path / "a-run" / "spec.yaml").write_text("steps: [")
    with pytest.raises(SpecError, match=r"a-run/spec.yaml:1"):
        take_over(spec_in(tmp_path), "a-run")


def test_the_status_of_the_winner_is_whole(tmp_path: Path) -> None:
    held = driven(tmp_path, state=RunState.FAILED)
    found = take_over(spec_in(tmp_path), "a-run")
    assert isinstance(found and found.status, RunStatus)
    assert found.status.run_id == held.status.run_id
    assert found.status.started_at == held.status.started_at
