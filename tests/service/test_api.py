"""The status API against run directories: what it sends equals what lies there."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.runs_made import (
    QUICKSTART,
    made_evaluation,
    made_metrics,
    made_run,
    made_samples,
    made_status,
)
from tests.service.api_served import Answer, Served, serving, write_metrics
from tip_ray.contract.run_state import ObservedStatus, RunState, StepMetrics
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import load_spec
from tip_ray.service import api_prometheus
from tip_ray.service.api import ARROW

CSP = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "runs") as one:
        yield one


def running(root: str, run_id: str, **changes: Any) -> RunDirectory:
    directory = RunDirectory.create(root, run_id, load_spec(QUICKSTART))
    directory.write_status(made_status(run_id, state=RunState.RUNNING, **changes))
    return directory


def table_of(answer: Answer) -> pa.Table:
    assert answer.status == 200
    assert answer.headers["content-type"] == ARROW
    return pa.ipc.open_stream(answer.body).read_all()


def test_a_status_is_the_file_and_how_it_looks_now(served: Served) -> None:
    running(served.root, "silent", heartbeat_at=time.time() - 60, loss=0.25)
    found = ObservedStatus.model_validate_json(served.get("/api/runs/silent").body)
    assert (found.health, found.loss) == ("stale", 0.25)
    assert 60 <= found.heartbeat_age_s < 120
    file = RunReader(f"{served.root}/silent").read_status()
    assert found.model_dump(exclude={"health", "heartbeat_age_s"}) == file.model_dump()


def test_a_change_is_seen_by_the_next_request(served: Served) -> None:
    directory = running(served.root, "a-run")
    for step in range(1, 6):
        directory.write_status(made_status("a-run", step=step, state=RunState.RUNNING))
        directory.append_metrics(made_metrics(step))
        directory.write_event("tick", step)
        assert served.get("/api/runs/a-run").json()["step"] == step
        assert served.get("/api/runs").json()["runs"][0]["step"] == step
        steps = served.get("/api/runs/a-run/metrics?columns=step").json()["columns"]["step"]
        assert steps == list(range(1, step + 1))
        assert len(served.get("/api/runs/a-run/events").json()["events"]) == step
    directory.append_metrics(made_metrics(3, loss=7.0))  # a replayed step
    directory.forget_after(4)
    columns = served.get("/api/runs/a-run/metrics?columns=loss").json()["columns"]
    assert columns == {"step": [1, 2, 3, 4], "loss": [0.5, 0.5, 7.0, 0.5]}


def test_runs_are_listed_newest_first_by_pages(served: Served) -> None:
    assert served.get("/api/runs").json() == {"runs": [], "broken": [], "total": 0}
    for number in range(5):
        running(served.root, f"run-{number}", started_at=1000.0 + number)
    (Path(served.root) / "not-a-run").mkdir()
    (Path(served.root) / "Not_A_Run_Id").mkdir()
    found = served.get("/api/runs").json()
    assert [run["run_id"] for run in found["runs"]] == [f"run-{n}" for n in (4, 3, 2, 1, 0)]
    assert (found["broken"], found["total"]) == ([], 5)
    page = served.get("/api/runs?limit=2&offset=3").json()
    assert [run["run_id"] for run in page["runs"]] == ["run-1", "run-0"]
    assert page["total"] == 5
    for run in found["runs"]:
        ObservedStatus.model_validate(run)


def test_metrics_are_those_of_the_directory(served: Served) -> None:
    directory = running(served.root, "a-run", steps=230)
    write_metrics(Path(directory.url), 230)  # two parts of a hundred, thirty single ones
    table = RunReader(directory.url).read_metrics()
    assert served.get("/api/runs/a-run/metrics").json()["columns"] == table.to_pydict()
    assert table_of(served.get("/api/runs/a-run/metrics", Accept=ARROW)).equals(table)
    later = table_of(served.get("/api/runs/a-run/metrics?after_step=228", Accept=ARROW))
    assert later.equals(table.slice(228))
    thin = served.get("/api/runs/a-run/metrics?max_points=24&columns=loss,lag").json()["columns"]
    assert list(thin) == ["step", "loss", "lag"]
    assert (thin["step"][0], thin["step"][-1], len(thin["step"])) == (1, 230, 24)
    gaps = {b - a for a, b in zip(thin["step"], thin["step"][1:], strict=False)}
    assert gaps <= {9, 10, 11}
    assert thin["loss"] == [1 / step for step in thin["step"]]
    one = served.get("/api/runs/a-run/metrics?max_points=1&columns=step").json()
    assert one == {"columns": {"step": [230]}}
    assert table_of(
        served.get("/api/runs/a-run/metrics?max_points=2&columns=step", Accept=ARROW)
    ).column("step").to_pylist() == [1, 230]


def test_numbers_that_are_not_finite_are_null(served: Served) -> None:
    directory = running(served.root, "a-run")
    directory.append_metrics(made_metrics(1, loss=math.nan, grad_norm=math.inf))
    answer = served.get("/api/runs/a-run/metrics?columns=loss,grad_norm")
    assert json.loads(answer.body, parse_constant=pytest.fail)["columns"] == {
        "step": [1],
        "loss": [None],
        "grad_norm": [None],
    }


def test_a_run_that_has_only_begun_has_empty_tables(served: Served) -> None:
    running(served.root, "new")
    columns = served.get("/api/runs/new/metrics").json()["columns"]
    assert columns == {name: [] for name in StepMetrics.model_fields}
    assert served.get("/api/runs/new/events").json() == {"events": []}
    empty = {"step": None, "steps": [], "samples": []}
    assert served.get("/api/runs/new/samples").json() == empty
    answer = served.get("/api/runs/new/samples", Accept=ARROW)
    assert (answer.status, answer.error) == (404, "new: no samples yet")


def test_events_after_a_time_and_the_newest_of_many(served: Served) -> None:
    directory = running(served.root, "a-run")
    for step in range(5):
        directory.write_event("tick", step, note="<b>")
        time.sleep(0.002)
    directory.write_evaluation(made_evaluation(5, 0.5))
    events = RunReader(directory.url).read_events()
    assert served.get("/api/runs/a-run/events").json()["events"] == events
    after = events[2]["time"]
    assert served.get(f"/api/runs/a-run/events?after={after!r}").json()["events"] == events[3:]
    assert served.get("/api/runs/a-run/events?limit=2").json()["events"] == events[4:]


def test_samples_of_a_step_or_of_the_newest(served: Served) -> None:
    made_run(served.root, "a-run", steps=3)
    reader = RunReader(f"{served.root}/a-run")
    newest = served.get("/api/runs/a-run/samples").json()
    assert newest == {"step": 3, "steps": [1, 3], "samples": reader.read_samples(3).to_pylist()}
    assert served.get("/api/runs/a-run/samples?step=1").json()["step"] == 1
    answer = served.get("/api/runs/a-run/samples?step=1", Accept=ARROW)
    assert table_of(answer).equals(reader.read_samples(1))
    assert answer.headers["x-tip-ray-step"] == "1"
    gone = served.get("/api/runs/a-run/samples?step=2")
    assert (gone.status, gone.error) == (404, "a-run: no samples of step 2")


def test_the_spec_is_the_file(served: Served) -> None:
    made_run(served.root, "a-run", steps=1)
    spec = served.get("/api/runs/a-run/spec").json()
    assert spec == RunReader(f"{served.root}/a-run").read_spec()


def test_cancel_asks_a_run_that_goes_on_and_no_other(served: Served) -> None:
    directory = running(served.root, "a-run")
    for _ in range(2):
        answer = served.post("/api/runs/a-run/cancel")
        asked = {"run_id": "a-run", "state": "RUNNING", "cancelling": True}
        assert (answer.status, answer.json()) == (202, asked)
        assert directory.cancel_requested()
    ended = made_run(served.root, "ended", steps=1)
    answer = served.post("/api/runs/ended/cancel")
    done = {"run_id": "ended", "state": "SUCCEEDED", "cancelling": False}
    assert (answer.status, answer.json()) == (200, done)
    assert not ended.cancel_requested()
    assert served.post("/api/runs/absent/cancel").status == 404
    assert not (Path(served.root) / "absent").exists()


def test_any_file_system(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}/runs"
    made_run(root, "a-run", steps=3)
    with serving(root) as served:
        assert [run["run_id"] for run in served.get("/api/runs").json()["runs"]] == ["a-run"]
        assert served.get("/api/runs/a-run").json()["step"] == 3
        steps = served.get("/api/runs/a-run/metrics?columns=step").json()["columns"]["step"]
        assert steps == [1, 2, 3]
        assert len(served.get("/api/runs/a-run/events").json()["events"]) == 2
        assert served.get("/api/runs/a-run/samples").json()["step"] == 3
        assert served.get("/api/runs/a-run/samples?step=2").status == 404
        assert served.get("/api/runs/a-run/spec").json()["steps"] == 3
        assert served.get("/api/runs/absent/metrics").status == 404
        assert "tip_ray_runs 1.0" in served.get("/metrics").body.decode()
        assert served.post("/api/runs/a-run/cancel").json()["cancelling"] is False


def test_prometheus_gauges_are_those_of_the_status(served: Served) -> None:
    running(served.root, "live", step=7, loss=0.5, bytes_shipped=123, recoveries=2)
    made_run(served.root, "ended", steps=2)
    (Path(served.root) / "broken").mkdir()
    (Path(served.root) / "broken" / "status.json").write_text("{")
    for _ in range(3):
        served.get("/api/runs/live")
    answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
    assert found[("tip_ray_runs",)] == 2
    assert found[("tip_ray_runs_broken",)] == 1
    assert found[("tip_ray_run_step", "run_id=live")] == 7
    assert found[("tip_ray_run_loss", "run_id=live")] == 0.5
    assert found[("tip_ray_run_shipped_bytes", "run_id=live")] == 123
    assert found[("tip_ray_run_recoveries", "run_id=live")] == 2
    assert found[("tip_ray_run_accuracy", "run_id=ended")] == 0.95
    assert ("tip_ray_run_accuracy", "run_id=live") not in found
    states = {key[2]: value for key, value in found.items() if key[0] == "tip_ray_run_state"}
    assert len(states) == len(RunState)
    assert found[("tip_ray_run_state", "run_id=live", "state=RUNNING")] == 1
    assert found[("tip_ray_run_state", "run_id=live", "state=FAILED")] == 0
    assert found[("tip_ray_run_health", "health=live", "run_id=live")] == 1
    counted = ("method=GET", "route=/api/runs/{run_id}", "status=200")
    assert found[("tip_ray_service_requests_total", *counted)] == 3


def test_prometheus_labels_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_prometheus, "RUNS_SHOWN", 2)
    for number in range(4):
        made_run(served.root, f"ended-{number}", steps=1)
    running(served.root, "live", started_at=1.0)  # the oldest, but it goes on
    for number in range(20):
        served.get(f"/api/runs/any-{number}")
        served.get(f"/any/{number}")
        served.ask(f"METHOD{number}", "/healthz")
    families = text_string_to_metric_families(served.get("/metrics").body.decode())
    labels = [sample.labels for family in families for sample in family.samples]
    assert {one["run_id"] for one in labels if "run_id" in one} == {"live", "ended-3"}
    assert {one["route"] for one in labels if "route" in one} == {
        "/api/runs/{run_id}",
        "/healthz",
        "other",
    }
    assert {one["method"] for one in labels if "method" in one} == {"GET", "other"}


def test_the_page_and_its_files_are_open_and_safe(served: Served) -> None:
    page = served.ask("GET", "/")
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    for answer in (page, served.ask("GET", "/page/api.js"), served.ask("GET", "/healthz")):
        assert answer.status == 200
        assert answer.headers["content-security-policy"] == CSP
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert served.ask("GET", "/page/api.js").headers["content-type"].startswith("text/javascript")
    assert served.ask("GET", "/healthz").json() == {"status": "ok"}
    assert served.get("/api/runs").headers["cache-control"] == "no-store"


def test_openapi_names_the_shape_of_every_answer(served: Served) -> None:
    paths = served.ask("GET", "/openapi.json").json()["paths"]
    assert set(paths) == {
        "/healthz",
        "/metrics",
        "/api/runs",
        "/api/runs/{run_id}",
        "/api/runs/{run_id}/spec",
        "/api/runs/{run_id}/metrics",
        "/api/runs/{run_id}/events",
        "/api/runs/{run_id}/samples",
        "/api/runs/{run_id}/cancel",
    }
    for path, methods in paths.items():
        for operation in methods.values():
            for answer in operation["responses"].values():
                kinds = answer.get("content", {})
                assert kinds, path
                assert kinds.get("application/json", {}).get("schema", {"$ref": ""}), path
            assert (path == "/healthz") == ("security" not in operation)
    assert served.ask("GET", "/docs").status == 401
    assert served.get("/docs").status == 404


def test_a_sample_is_written_anew(served: Served) -> None:
    directory = running(served.root, "a-run")
    for text in ("one", "two"):  # a replayed step
        directory.write_samples(1, made_samples(1, [list(text)]))
        rows = served.get("/api/runs/a-run/samples").json()["samples"]
        assert rows[0]["text"] == list(text)
