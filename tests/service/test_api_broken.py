"""The status API against broken files and links that lead elsewhere.

Never a 500, never what lies outside the run, and the other runs go on.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runs_made import made_samples, made_status
from tests.service.api_served import Served, refused, write_metrics
from tip_ray.contract.run_state import RunState
from tip_ray.control.run_directory import RunDirectory
from tip_ray.service import api, api_read
from tip_ray.service.api import ARROW


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00" * 100,
        "[" * 100_000,
        '{"run_id": "one"}',
        json.dumps({**made_status("one").model_dump(), "state": "<script>alert(1)</script>"}),
        made_status("one")
        .model_dump_json()
        .replace('"heartbeat_at":1', '"heartbeat_at":1e999,"a":1'),
        made_status("one").model_dump_json() + " " * (1 << 20),
        made_status("two").model_dump_json(),
        made_status("one", error="?").model_dump_json().replace("?", "\\ud800"),
    ],
    ids=lambda content: repr(content)[:30],
)
def test_a_broken_status_is_named_and_the_other_runs_still_show(
    served: Served, content: str
) -> None:
    (Path(served.root) / "one" / "status.json").write_text(content)
    line = refused(served.get("/api/runs/one"), 409)
    assert line.startswith("one/status.json: ")
    assert refused(served.post("/api/runs/one/cancel"), 409) == line
    found = served.get("/api/runs")
    assert found.status == 200
    assert [run["run_id"] for run in found.json()["runs"]] == ["two"]
    assert found.json()["broken"] == [line]
    assert served.get("/metrics").status == 200
    assert served.root not in line


def test_a_status_that_is_no_file_blocks_nobody(served: Served) -> None:
    status = Path(served.root) / "one" / "status.json"
    status.unlink()
    refused(served.get("/api/runs/one"), 404)
    os.mkfifo(status)
    assert "no plain file" in refused(served.get("/api/runs/one"), 409)
    assert len(served.get("/api/runs").json()["broken"]) == 1
    status.unlink()
    status.mkdir()
    refused(served.get("/api/runs/one"), 409)


def test_numbers_that_no_float_can_hold(served: Served) -> None:
    status = made_status("one").model_dump(mode="json") | {"step": 10**400, "loss": 1e308}
    (Path(served.root) / "one" / "status.json").write_text(json.dumps(status))
    assert served.get("/api/runs/one").status in (200, 409)
    assert served.get("/api/runs").status == 200
    assert served.get("/metrics").status == 200


def test_a_metrics_part_cut_in_half_is_named_until_it_is_whole(served: Served) -> None:
    write_metrics(Path(served.root) / "one", 203)
    part = Path(served.root) / "one" / "metrics" / "steps-00000101-00000200.parquet"
    whole = part.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        b"",
        whole[:-1],
        b"PAR1" + whole[4:-4][::-1] + b"PAR1",
    ):
        part.write_bytes(content)
        for accept in ("*/*", ARROW):
            answer = served.get("/api/runs/one/metrics", Accept=accept)
            assert refused(answer, 409).startswith(f"one/metrics/{part.name}: not a whole Parquet")
    part.write_bytes(whole)
    assert served.get("/api/runs/one/metrics").status == 200


@pytest.mark.parametrize("seed", range(8))
def test_no_flipped_byte_of_a_table_is_a_500(served: Served, seed: int) -> None:
    rng = random.Random(seed)
    samples = Path(served.root) / "one" / "samples" / "step-00000002.arrow"
    metrics = Path(served.root) / "one" / "metrics" / "step-00000002.parquet"
    for path, url in ((samples, "samples"), (metrics, "metrics")):
        whole = bytearray(path.read_bytes())
        for _ in range(12):
            content = whole.copy()
            for _ in range(rng.randint(1, 6)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            for accept in ("*/*", ARROW):
                answer = served.get(f"/api/runs/one/{url}", Accept=accept)
                assert answer.status == 200 or path.name in refused(answer, 409)


SAMPLES: dict[str, pa.Table] = {
    "no samples": pa.table({"a": [1]}),
    "a column twice": pa.table([[1], [2]], names=["step", "step"]),
    "another type": pa.table({"step": ["<b>"]}),
    "a zone that is none": pa.table({"step": pa.array([1], pa.timestamp("s", "No/Where"))}),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_table_of_something_else_is_no_500(served: Served, name: str) -> None:
    table, run = SAMPLES[name], Path(served.root) / "one"
    path = run / "samples" / "step-00000002.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    answer = served.get("/api/runs/one/samples")
    if name == "no samples":  # a release without any of today's columns
        assert answer.json()["samples"] == [{}]
    else:
        assert path.name in refused(answer, 409)
    part = run / "metrics" / "step-00000002.parquet"
    pq.write_table(table, part)
    answer = served.get("/api/runs/one/metrics")
    if name == "a zone that is none":  # milliseconds, and so numbers
        assert answer.json()["columns"]["step"] == [1, 1000]
    else:
        assert part.name in refused(answer, 409)


def test_a_column_whose_name_is_no_text_is_no_500(served: Served) -> None:
    run = Path(served.root) / "one"
    for path, url in (
        (run / "samples" / "step-00000002.arrow", "samples"),
        (run / "metrics" / "step-00000002.parquet", "metrics"),
    ):
        name = b"prompt_uid" if url == "samples" else b"learning_rate"
        path.write_bytes(path.read_bytes().replace(name, b"\xff" + name[1:]))
        assert path.name in refused(served.get(f"/api/runs/one/{url}"), 409)


def test_samples_cut_short_are_named(served: Served) -> None:
    path = Path(served.root) / "one" / "samples" / "step-00000002.arrow"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"<html>"):
        path.write_bytes(content)
        assert path.name in refused(served.get("/api/runs/one/samples"), 409)
    assert served.get("/api/runs/one/samples?step=1").status == 200


def test_a_broken_event_is_named_until_it_is_gone(served: Served) -> None:
    event = Path(served.root) / "one" / "events" / "9999999999999-000001-x.json"
    for content in ("{", "[]", '{"time": "now"}', "[" * 100_000, '{"time": 1, "x": "\\ud800"}'):
        event.write_text(content)
        refused(served.get("/api/runs/one/events"), 409)
    event.unlink()
    assert len(served.get("/api/runs/one/events").json()["events"]) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "a: [",
        "when: 2026-13-45",
        "a: &a [*a]",
        "[" * 1000,
        "a: &a [0,0,0,0,0,0,0,0,0,0]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefghi")),
        "!!python/object/apply:os.system ['true']",
        "a: !!binary 'x'",
        b"a: \xff".decode("latin-1"),
        "a: " + "x" * (1 << 20),
    ],
    ids=lambda content: repr(content)[:30],
)
def test_a_broken_spec_is_named(served: Served, content: str) -> None:
    (Path(served.root) / "one" / "spec.yaml").write_bytes(content.encode("latin-1"))
    assert "spec.yaml" in refused(served.get("/api/runs/one/spec"), 409)


def test_html_in_a_prompt_stays_json(served: Served) -> None:
    html = "</script><img src=x onerror=alert(1)>\u2028\u202e\x00"
    directory = RunDirectory.open(served.root, "one")
    directory.write_samples(3, made_samples(3, [[html]]))
    answer = served.get("/api/runs/one/samples", Accept="text/html")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["samples"][0]["text"] == [html]
    directory.write_status(made_status("one", state=RunState.FAILED, error=html))
    answer = served.get("/api/runs/one", Accept="text/html")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"] == html


def link(at: Path, to: Path | str) -> None:
    if at.is_dir():
        at.rename(at.with_name("Moved"))
    else:
        at.unlink(missing_ok=True)
    at.symlink_to(to)


LINKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a run out of the root": (lambda run: link(run, "../outside"), ""),
    "a run to another": (lambda run: link(run, "two"), ""),
    "a status to another run": (lambda run: link(run / "status.json", "../two/status.json"), ""),
    "a status out": (lambda run: link(run / "status.json", "/etc/passwd"), ""),
    "a spec to another run": (lambda run: link(run / "spec.yaml", "../two/spec.yaml"), "/spec"),
    "a spec out": (lambda run: link(run / "spec.yaml", "../../secret.json"), "/spec"),
    "metrics to another run": (lambda run: link(run / "metrics", "../two/metrics"), "/metrics"),
    "a part to another run": (
        lambda run: link(run / "metrics/step-00000001.parquet", "../../two/status.json"),
        "/metrics",
    ),
    "events out": (lambda run: link(run / "events", "../../"), "/events"),
    "an event out": (lambda run: link(run / "events/1-x.json", "../../../secret.json"), "/events"),
    "samples to another run": (lambda run: link(run / "samples", "../two/samples"), "/samples"),
    "a sample to another run": (
        lambda run: link(run / "samples/step-00000002.arrow", "../../two/spec.yaml"),
        "/samples",
    ),
}


@pytest.mark.parametrize("name", LINKS)
def test_no_link_leads_out_of_a_run(served: Served, name: str) -> None:
    make, tail = LINKS[name]
    make(Path(served.root) / "one")
    assert "link" in refused(served.get(f"/api/runs/one{tail}"), 409)
    if not tail:
        listed = served.get("/api/runs").json()
        assert [run["run_id"] for run in listed["runs"]] == ["two"]
        assert "link" in listed["broken"][0]
        refused(served.post("/api/runs/one/cancel"), 409)


def test_a_link_to_nothing_and_one_in_a_circle(served: Served) -> None:
    link(Path(served.root) / "one" / "status.json", "status.json")
    refused(served.get("/api/runs/one"), 404, 409)
    link(Path(served.root) / "circle", "circle")
    refused(served.get("/api/runs/circle"), 409)
    assert served.get("/api/runs").status == 200


def test_files_too_large_to_send_are_not_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_read, "_TABLE_BYTES", 1000)
    for url in ("samples", "metrics"):
        assert "expected at most 1,000" in refused(served.get(f"/api/runs/one/{url}"), 409)


def test_samples_too_large_for_json_are_sent_as_arrow(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_JSON_BYTES", 100)
    assert ARROW in refused(served.get("/api/runs/one/samples"), 413)
    assert served.get("/api/runs/one/samples", Accept=ARROW).status == 200
