"""Trackers: real event files, an offline W&B run, a local MLflow store; and trackers that fail."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.jobs.harness import quickstart
from tests.runs_made import made_evaluation, made_metrics
from tip_ray.contract.errors import SpecError
from tip_ray.contract.run_state import RunState
from tip_ray.contract.spec import RunSpec
from tip_ray.control import tracking as module
from tip_ray.control.trackers import check_trackers
from tip_ray.control.tracking import Tracking

RUN_ID = "tracked"


def spec_with(tmp_path: Path, **tracker: Any) -> RunSpec:
    return quickstart(run_root=str(tmp_path), tracking=[tracker])


def follow(spec: RunSpec, directory: Path, steps: list[int], rewind: int | None = None) -> Tracking:
    """A driver that trains `steps`, loss = step / 10, and ends."""
    tracking = Tracking(spec, RUN_ID, str(directory))
    if rewind is not None:
        tracking.rewind(rewind)
    for step in steps:
        tracking.step(made_metrics(step, loss=step / 10))
    tracking.evaluation(made_evaluation(steps[-1], 0.5))
    tracking.end(RunState.SUCCEEDED)
    return tracking


def test_tensorboard_shows_a_replayed_step_once(tmp_path: Path) -> None:
    spec = spec_with(tmp_path, kind="tensorboard")
    first = follow(spec, tmp_path, [1, 2, 3])
    again = follow(spec, tmp_path, [3, 4], rewind=2)
    assert first.taken_events() == again.taken_events() == []
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(point.step, round(point.value, 6)) for point in events.Scalars("loss")]
    assert losses == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert [point.step for point in events.Scalars("evaluation/carry/mean")][-1] == 4
    assert "learner_peak_bytes" in events.Tags()["scalars"]


def test_wandb_goes_on_with_the_same_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    spec = spec_with(tmp_path, kind="wandb", project="tip")
    for steps in ([1, 2], [2, 3]):
        assert follow(spec, tmp_path, steps).taken_events() == []
        time.sleep(1.1)  # W&B names an offline run's folder after the second it began in
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{RUN_ID}/run-{RUN_ID}.wandb"))
    assert len(files) == 2  # two files of one run, which a sync puts together
    expected = [[(1, 0.1), (2, 0.2)], [(2, 0.2), (3, 0.3)]]
    deadline = time.monotonic() + 30  # W&B's own process writes, and may be behind
    while (written := [logged(file) for file in files]) != expected:
        assert time.monotonic() < deadline, written
        time.sleep(0.1)


def logged(file: Path) -> list[tuple[int, float]]:
    """(step, loss) of each step in an offline run's own file, as far as it is written."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(data)
        except DecodeError:
            return found
        values = {
            item.key or ".".join(item.nested_key): item.value_json for item in record.history.item
        }
        if "loss" in values:
            found.append((int(values["step"]), float(values["loss"])))
    return found


def records(content: bytes, block: int = 1 << 15) -> Iterator[bytes]:
    """Of LevelDB's log format behind 7 bytes of W&B's: checksum, length, kind, data."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block  # a block's end that no header fits in
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the last piece
            yield whole
            whole = b""


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlflow").as_uri()
    spec = spec_with(tmp_path, kind="mlflow", tracking_uri=uri, tags={"team": "tip"})
    assert follow(spec, tmp_path, [1, 2]).taken_events() == []
    assert follow(spec, tmp_path, [3]).taken_events() == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("carry-quickstart")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["selection.rule"] == "soft_or"
    assert run.data.tags["team"] == "tip"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 0.1), (2, 0.2), (3, 0.3)]


class Faulty:
    """A tracker that fails at some steps and hangs at others."""

    def __init__(self, fails: set[int], hangs: set[int]) -> None:
        self.fails, self.hangs = fails, hangs
        self.told: list[int] = []
        self.release = threading.Event()

    def log(self, step: int, values: Any) -> None:  # noqa: ARG002
        if step in self.fails:
            raise RuntimeError("the tracker's server is away\nsecond line")
        if step in self.hangs:
            self.release.wait()
        self.told.append(step)

    def rewind(self, step: int) -> None: ...

    def end(self, state: RunState) -> None: ...


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Faulty] = []

    def make(**faults: set[int]) -> Faulty:
        made.append(Faulty(**{"fails": set(), "hangs": set(), **faults}))
        monkeypatch.setattr(module, "open_tracker", lambda *_: made[-1])
        return made[-1]

    yield make
    for one in made:
        one.release.set()


def test_a_failure_is_an_event_and_what_was_missed_is_counted(tmp_path: Path, faulty: Any) -> None:
    tracker = faulty(fails={2, 3})
    tracking = follow(spec_with(tmp_path, kind="wandb"), tmp_path, [1, 2, 3, 4])
    assert tracker.told == [1, 4, 4]  # the last is the evaluation
    assert [(event.kind, event.facts) for event in tracking.taken_events()] == [
        (
            "tracker_failed",
            {"tracker": "wandb", "reason": "RuntimeError: the tracker's server is away"},
        ),
        ("tracker_recovered", {"tracker": "wandb", "steps_missed": 2}),
    ]


def test_one_that_hangs_holds_nobody_up(
    tmp_path: Path, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END_S", 0.2)
    faulty(hangs={1})
    began = time.monotonic()
    tracking = follow(spec_with(tmp_path, kind="mlflow"), tmp_path, [1, 2])
    assert time.monotonic() - began < 30  # it would wait forever
    (event,) = tracking.taken_events()
    assert event.kind == "tracker_failed"
    assert event.facts["steps_missed"] == 4  # step 2, the evaluation and the end, all unread


def test_one_that_cannot_be_opened_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise ConnectionError("no key")

    monkeypatch.setattr(module, "open_tracker", refuse)
    tracking = follow(spec_with(tmp_path, kind="wandb"), tmp_path, [1, 2])
    assert [(event.kind, event.facts["reason"]) for event in tracking.taken_events()] == [
        ("tracker_failed", "ConnectionError: no key")
    ]


@pytest.mark.parametrize(
    ("tracker", "root", "line"),
    [
        ({"kind": "wandb", "api_key": "x"}, "runs", r"tracking\[0\]\.api_key.*environment"),
        ({"kind": "tensorboard"}, "memory://runs", r"tracking\[0\]\.log_dir: found nothing"),
    ],
)
def test_what_is_refused_before_anything_starts(
    tracker: dict[str, Any], root: str, line: str
) -> None:
    with pytest.raises(SpecError, match=line):
        check_trackers(quickstart(run_root=root, tracking=[tracker]))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SpecError, match=r"pip install 'tip-ray\[mlflow\]'"):
        check_trackers(quickstart(tracking=[{"kind": "mlflow"}]))
