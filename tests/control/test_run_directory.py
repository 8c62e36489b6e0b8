"""A run's files: written by one, read by many, whole or refused."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs_made import (
    QUICKSTART,
    made_evaluation,
    made_metrics,
    made_run,
    made_samples,
    made_status,
)
from tip_ray.contract.errors import (
    NotFoundError,
    RunDirectoryError,
    SpecError,
    TableError,
    TipRayError,
)
from tip_ray.contract.headers import Quarantined
from tip_ray.contract.run_state import RunState
from tip_ray.control import run_directory
from tip_ray.control.run_directory import (
    RunDirectory,
    is_run_id,
    new_run_id,
    resolve_run_root,
)
from tip_ray.control.run_reader import RunReader, list_runs, resolve_run
from tip_ray.control.spec_file import load_spec
from tip_ray.control.storage import Storage


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A run root on a disk, and one on an object store."""
    if request.param == "local":
        yield str(tmp_path / "runs")
        return
    yield f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def directory(root: str) -> RunDirectory:
    return RunDirectory.create(root, "a-run", load_spec(QUICKSTART))


@pytest.fixture
def reader(directory: RunDirectory) -> RunReader:
    return RunReader(directory.url)


def one_line(error: TipRayError) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_a_run_is_created_once_and_opened_after(root: str, directory: RunDirectory) -> None:
    with pytest.raises(RunDirectoryError, match="the run exists"):
        RunDirectory.create(root, "a-run", load_spec(QUICKSTART))
    assert RunDirectory.open(root, "a-run").url == directory.url
    with pytest.raises(NotFoundError, match="no such run"):
        RunDirectory.open(root, "another")


def test_the_stored_spec_is_resolved_and_has_no_secrets(tmp_path: Path) -> None:
    spec = load_spec(QUICKSTART, {"rollout.engine_args": {"hf_token": "hf_abc"}})
    directory = RunDirectory.create(str(tmp_path), "a-run", spec)
    stored = RunReader(directory.url).read_spec()
    assert stored["run_root"] == str(tmp_path)
    assert stored["rollout"]["engine_args"] == {"hf_token": "***"}
    assert stored["selection"]["rule"] == "soft_or"


def test_a_status_is_read_back_equal(directory: RunDirectory, reader: RunReader) -> None:
    with pytest.raises(NotFoundError, match="has not begun"):
        reader.read_status()
    status = made_status("a-run", state=RunState.RUNNING, loss=0.25, step=3)
    directory.write_status(status)
    assert reader.read_status() == status


def test_readers_never_see_half_a_status(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path), "a-run", load_spec(QUICKSTART))
    directory.write_status(made_status("a-run"))
    done = threading.Event()

    def write() -> None:
        for step in range(150):
            directory.write_status(made_status("a-run", step=step, error="e" * (step * 97 % 5000)))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    steps = []
    while not done.is_set():
        steps.append(RunReader(directory.url).read_status().step)
    writer.join()
    assert steps == sorted(steps)
    assert len(set(steps)) > 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_driver_that_was_replaced_cannot_write(directory: RunDirectory) -> None:
    directory.write_status(made_status("a-run", epoch=2, driver="ours"))
    for epoch, driver in ((1, "ours"), (2, "theirs")):
        with pytest.raises(RunDirectoryError, match="taken over by another driver"):
            directory.write_status(made_status("a-run", epoch=epoch, driver=driver))
    directory.write_status(made_status("a-run", epoch=2, driver="ours", step=1))
    directory.write_status(made_status("a-run", epoch=3, driver="theirs"))


def test_steps_that_will_be_made_again_are_forgotten(
    directory: RunDirectory, reader: RunReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "MERGE_STEPS", 5)
    for step in range(1, 13):
        directory.append_metrics(made_metrics(step))
        directory.write_samples(step, made_samples(step, [["7"]]))
    for last in (11, 7, 5, 0):
        directory.forget_after(last)
        assert reader.read_metrics().column("step").to_pylist() == list(range(1, last + 1))
        assert reader.sample_steps() == list(range(1, last + 1))


def test_metrics_are_one_table_in_order_of_step(
    directory: RunDirectory, reader: RunReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged or not, replayed or not: the newest row of each step, against a plain dictionary."""
    monkeypatch.setattr(run_directory, "MERGE_STEPS", 5)
    expected: dict[int, float] = {}
    order = [*range(1, 14), *range(8, 13), *range(13, 23), 3]  # a restart at 8, a stray third step
    for count, step in enumerate(order):
        expected[step] = count / 7
        directory.append_metrics(made_metrics(step, loss=count / 7, tokens_kept=count))
        table = reader.read_metrics()
        assert table.column("step").to_pylist() == sorted(expected)
        assert table.column("loss").to_pylist() == [expected[step] for step in sorted(expected)]
    assert len(directory.storage.names("metrics")) == 4 + 3  # merged fives; 21, 22 and the stray 3


def test_metrics_before_the_first_step_and_without_a_number(
    directory: RunDirectory, reader: RunReader
) -> None:
    assert reader.read_metrics().num_rows == 0
    directory.append_metrics(made_metrics(1, loss=math.nan, grad_norm=math.inf))
    row = reader.read_metrics().to_pylist()[0]
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf


def test_events_come_back_in_order_of_time(directory: RunDirectory, reader: RunReader) -> None:
    assert reader.read_events() == []
    for step in range(12):
        directory.write_event("fault", step, pool="rollout", loss=math.nan, tries=[1, math.inf])
    events = reader.read_events()
    assert [event["step"] for event in events] == list(range(12))
    assert events[0]["kind"] == "fault"
    assert (events[0]["loss"], events[0]["tries"]) == ("nan", [1, "inf"])
    with pytest.raises(ValueError, match="event kind"):
        directory.write_event("../fault", 1)


def test_a_replayed_evaluation_replaces_the_first(
    directory: RunDirectory, reader: RunReader
) -> None:
    for step, mean in ((0, 0.4), (10, 0.6), (0, 0.5)):
        directory.write_evaluation(made_evaluation(step, mean))
    assert [(one.step, one.mean) for one in reader.read_evaluations()] == [(0, 0.5), (10, 0.6)]


def test_samples_are_read_by_step_or_the_newest(directory: RunDirectory, reader: RunReader) -> None:
    with pytest.raises(NotFoundError, match="no samples yet"):
        reader.read_samples()
    tables = {step: made_samples(step, [list("7+8"), ["<eos>"]], seed=step) for step in (2, 10)}
    for step, table in tables.items():
        directory.write_samples(step, table)
    assert reader.sample_steps() == [2, 10]
    assert reader.read_samples(2).equals(tables[2])
    assert reader.read_samples().equals(tables[10])
    with pytest.raises(NotFoundError, match="no samples of step 3"):
        reader.read_samples(3)
    with pytest.raises(TableError, match="'text'"):
        directory.write_samples(3, tables[2].drop_columns(["text"]))


def test_quarantine_has_one_line_a_rollout(directory: RunDirectory, reader: RunReader) -> None:
    assert reader.read_quarantine() == []
    for slot in range(3):
        directory.quarantine([Quarantined((1, slot, 0), f"uid-{slot}", "teacher", "too\nlong")])
    directory.quarantine([])
    directory.storage.append("quarantine.jsonl", b'{"key": [1, ')  # cut off
    rows = reader.read_quarantine()
    assert [row["key"] for row in rows] == [[1, 0, 0], [1, 1, 0], [1, 2, 0]]
    assert rows[0]["reason"] == "too\nlong"


def test_the_log_is_written_by_the_next_status_and_goes_on_after_a_restart(
    root: str, directory: RunDirectory, reader: RunReader
) -> None:
    logger = logging.getLogger("tests.driver_log")
    logger.setLevel(logging.INFO)
    handler = directory.log_handler()
    logger.addHandler(handler)
    logger.info("first")
    logger.removeHandler(handler)
    directory.write_status(made_status("a-run"))
    assert reader.read_log().endswith("INFO tests.driver_log: first\n")
    again = RunDirectory.open(root, "a-run")
    again.append_log("second")
    again.flush_log()
    assert reader.read_log().splitlines()[-1] == "second"
    assert len(reader.read_log().splitlines()) == 2


def test_a_cancel_is_seen_and_forgotten(directory: RunDirectory, reader: RunReader) -> None:
    assert not directory.cancel_requested()
    RunDirectory(reader.storage, "a-run").request_cancel()  # another process
    assert directory.cancel_requested()
    directory.clear_cancel()
    directory.clear_cancel()
    assert not directory.cancel_requested()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("status.json", RunReader.read_status),
        ("spec.yaml", RunReader.read_spec),
        ("metrics/step-00000001.parquet", RunReader.read_metrics),
        ("samples/step-00000012.arrow", RunReader.read_samples),
    ],
)
def test_a_half_written_file_is_named_in_one_line(name: str, read: object, tmp_path: Path) -> None:
    directory = made_run(tmp_path, "a-run")
    assert callable(read)
    read(RunReader(directory.url))
    path = Path(directory.url) / name
    content = path.read_bytes()
    path.write_bytes(b"[" if name == "spec.yaml" else content[: len(content) // 2])
    with pytest.raises(RunDirectoryError) as caught:
        read(RunReader(directory.url))
    assert name in one_line(caught.value)


def test_a_metrics_part_that_is_listed_but_absent_does_not_hang(tmp_path: Path) -> None:
    directory = made_run(tmp_path, "a-run")
    (tmp_path / "a-run" / "metrics" / "step-00000099.parquet").symlink_to("absent.parquet")
    with pytest.raises(RunDirectoryError, match=r"step-00000099.parquet"):
        RunReader(directory.url).read_metrics()


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "a\\b", "a/."]
)
def test_no_name_leaves_the_root(name: str, root: str) -> None:
    with pytest.raises(RunDirectoryError, match="not a name inside"):
        Storage(root).path(name)


def test_a_digest_is_that_of_the_whole_file(root: str) -> None:
    storage = Storage(root)
    content = bytes(range(256)) * 5000  # more than one piece
    storage.write("a/b.bin", content)
    assert storage.digest("a/b.bin") == (len(content), hashlib.sha256(content).hexdigest())
    with pytest.raises(NotFoundError, match="no such file"):
        storage.digest("a/absent.bin")


def test_no_link_leaves_the_root(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "status.json").write_text("{}")
    inside = tmp_path / "runs"
    inside.mkdir()
    (inside / "a-run").symlink_to(outside)
    with pytest.raises(RunDirectoryError, match="a link out of"):
        Storage(str(inside)).read("a-run/status.json")


@pytest.mark.parametrize(
    "run_id", ["", "a/b", "../a", "A", "1a", "a-", "a_b", "a.b", "a" * 41, "a b", "a\n"]
)
def test_a_bad_run_id_is_refused(run_id: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--run-id"):
        RunDirectory.create(str(tmp_path), run_id, load_spec(QUICKSTART))
    assert not list(tmp_path.iterdir())


@given(
    name=st.from_regex(r"[a-z]([-a-z0-9]*[a-z0-9])?", fullmatch=True).filter(lambda n: len(n) < 41)
)
def test_a_new_run_id_is_one(name: str) -> None:
    run_id = new_run_id(name)
    assert is_run_id(run_id)
    head, day, clock, random_part = run_id.rsplit("-", 3)
    assert name.startswith(head)
    assert (len(day), len(clock), len(random_part)) == (6, 6, 4)


def test_a_relative_root_lies_under_the_variable_or_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    base = {"TIP_RAY_RUN_ROOT": "s3://bucket/base/"}
    assert resolve_run_root("runs", {}) == str(tmp_path / "runs")
    assert resolve_run_root("runs", base) == "s3://bucket/base/runs"
    assert resolve_run_root("runs", {**job, **base}) == "s3://bucket/base/runs"
    for absolute in ("/shared/runs", "s3://bucket/runs"):
        assert resolve_run_root(absolute, {**job, **base}) == absolute
    for environment in (job, {**job, "TIP_RAY_RUN_ROOT": "relative"}):
        with pytest.raises(SpecError, match="TIP_RAY_RUN_ROOT"):
            resolve_run_root("runs", environment)


def test_a_root_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for root in (str(file), "/proc/nowhere"):
        with pytest.raises(RunDirectoryError, match="cannot be written") as caught:
            RunDirectory.create(root, "a-run", load_spec(QUICKSTART))
        assert "--run-root" in one_line(caught.value)
    with pytest.raises(RunDirectoryError, match="Protocol not known"):
        RunDirectory.create("nowhere://x", "a-run", load_spec(QUICKSTART))


def test_runs_are_listed_newest_first_and_broken_ones_are_named(root: str) -> None:
    assert list_runs(root) == []
    for age, run_id in enumerate(("newest", "older", "oldest")):
        directory = RunDirectory.create(root, run_id, load_spec(QUICKSTART))
        directory.write_status(made_status(run_id, started_at=time.time() - age))
    RunDirectory.create(root, "not-begun", load_spec(QUICKSTART))
    RunDirectory.open(root, "older").storage.write("status.json", b"{")
    broken: list[str] = []
    assert [run.run_id for run in list_runs(root, broken.append)] == ["newest", "oldest"]
    assert len(broken) == 1
    assert "older/status.json" in broken[0]


def test_a_run_is_found_by_id_or_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made_run("runs", "here")
    made_run(tmp_path / "base" / "runs", "there")
    assert resolve_run("here").run_id == "here"
    assert resolve_run("here", str(tmp_path / "runs")).run_id == "here"
    assert resolve_run("runs/here").read_status().step == 12
    assert resolve_run(str(tmp_path / "runs" / "here") + "/").run_id == "here"
    monkeypatch.setenv("TIP_RAY_RUN_ROOT", str(tmp_path / "base"))
    assert resolve_run("there").run_id == "there"
    for absent in ("here", "..", "no/where", "Not-An-Id"):
        with pytest.raises(NotFoundError, match="no run"):
            resolve_run(absent)


def test_samples_that_lie_about_their_offsets_are_refused(
    directory: RunDirectory, reader: RunReader
) -> None:
    table = made_samples(1, [list("7+8+0=15"), list("*45")])
    directory.write_samples(1, table)
    bad = pa.Array.from_buffers(
        pa.list_(pa.field("item", pa.int32(), nullable=False)),
        2,
        [None, pa.py_buffer(b"\x00\x00\x00\x00\x64\x00\x00\x00\x0b\x00\x00\x00")],
        children=[pa.array(range(11), pa.int32())],
    )
    index = table.schema.get_field_index("response_ids")
    forged = table.set_column(index, table.schema.field(index), bad)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, forged.schema) as writer:
        writer.write_table(forged)
    directory.storage.write("samples/step-00000001.arrow", sink.getvalue().to_pybytes())
    with pytest.raises(RunDirectoryError, match=r"step-00000001.arrow"):
        reader.read_samples(1)
