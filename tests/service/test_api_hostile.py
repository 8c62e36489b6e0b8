"""The status API against bad tokens, bad requests, broken files and links that lead elsewhere.

Never a 500, never what lies outside the run, and the other runs go on.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runs_made import made_run, made_samples, made_status
from tests.service.api_served import TOKEN, WAIT_S, Answer, Served, serving, write_metrics
from tip_ray.contract.run_state import RunState
from tip_ray.control.run_directory import RunDirectory
from tip_ray.service import api, api_read, api_server
from tip_ray.service.api import ARROW

CANARY = "sk-this-must-not-be-seen"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good runs, `one` and `two`, one outside of their root, and a secret beside it."""
    place = tmp_path_factory.mktemp("made")
    (place / "secret.json").write_text(json.dumps({"time": 1.0, "key": CANARY}))
    made_run(place, "outside", steps=1)
    for run_id in ("one", "two"):
        made_run(place / "runs", run_id, steps=2)
    return place


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "place" / "runs") as one:
        yield one


@pytest.fixture
def served(made: Path, server: Served) -> Iterator[Served]:
    """One service for all tests, and the runs anew for each."""
    place = Path(server.root).parent
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(made, place)
    yield server
    assert server.get("/api/runs/two").status == 200


def refused(answer: Answer, *statuses: int) -> str:
    """The line of a failure; its headers are those of every answer."""
    assert answer.status in statuses, answer
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert CANARY.encode() not in answer.body
    return answer.error


def with_token(value: str) -> dict[str, str]:
    return {"Authorization": value}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        with_token(""),
        with_token("Bearer"),
        with_token("Bearer "),
        with_token(TOKEN),
        with_token(f"Basic {TOKEN}"),
        with_token(f"Bearer {TOKEN}x"),
        with_token(f"Bearer {TOKEN[:-1]}"),
        with_token(f"Bearer {TOKEN} {TOKEN}"),
        with_token(f"Bearer {TOKEN},Bearer {TOKEN}"),
        with_token(f"Bearer {TOKEN.upper()}"),
        with_token("Bearer \xff\xfe\xfd"),
        with_token("Bearer " + "x" * 8000),
        {"Authorization": f"Bearer {TOKEN}", "authorization": f"Bearer {TOKEN}"},
        {"X-Authorization": f"Bearer {TOKEN}"},
        {"Cookie": f"token={TOKEN}"},
    ],
    ids=lambda headers: repr(headers)[:40],
)
def test_no_token_but_the_right_one_opens_anything(
    served: Served, headers: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    for path in ("/api/runs", "/api/runs/one", "/metrics", "/api", "/absent", "//", "/page"):
        answer = served.ask("GET", path, headers)
        assert "Bearer TOKEN" in refused(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    refused(served.ask("POST", "/api/runs/one/cancel", headers), 401)
    refused(served.ask("GET", f"/api/runs?token={TOKEN}", headers), 401)
    assert TOKEN not in "".join(capfd.readouterr())


def test_the_scheme_is_read_in_any_case(served: Served) -> None:
    assert served.ask("GET", "/api/runs", with_token(f"bearer {TOKEN}")).status == 200


OUTSIDE = [
    "..",
    "../secret.json",
    "%2e%2e",
    "%2e%2e/secret.json",
    "%2e%2e%2fsecret.json",
    "..%2fsecret.json",
    "..%2f..%2f..%2f..%2fetc%2fpasswd",
    "%252e%252e%252fsecret.json",
    "..\\secret.json",
    "..%5csecret.json",
    "one/../two",
    "one%2f..%2ftwo",
    "one%00",
    "%00",
    "one%0a",
    "one%20",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "~root",
    "memory:%2f%2fx",
    "file:%2f%2f%2fetc",
    ".",
    "One",
    "1",
    "-one",
    "one-",
    "one.json",
    "o*e",
    "[one]",
    "%ff%fe",
    "%C0%AE%C0%AE",
    "%E2%80%AE",
    "n" * 41,
    "n" * 1800,
    "9" * 1500,
]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: repr(name)[:40])
def test_no_run_id_leads_out_of_the_root(served: Served, name: str) -> None:
    for tail in ("", "/spec", "/metrics", "/events", "/samples"):
        answer = served.get(f"/api/runs/{name}{tail}")
        refused(answer, 404)
        assert len(answer.body) < 400
    refused(served.post(f"/api/runs/{name}/cancel"), 404)
    for page in (f"/page/{name}", f"/page/../{name}", f"/page/vendor/%2e%2e/{name}"):
        answer = served.ask("GET", page)
        assert answer.status == 404
        assert b"root:" not in answer.body
    assert not list(Path(served.root).parent.glob("**/cancel"))


def test_no_file_of_a_run_is_reached_but_by_its_endpoint(served: Served) -> None:
    for tail in ("status.json", "spec.yaml", "logs/driver.log", "..%2ftwo", "metrics/..", "%2e"):
        refused(served.get(f"/api/runs/one/{tail}"), 404)


@pytest.mark.parametrize(
    "query",
    [
        "metrics?after_step=-1",
        "metrics?after_step=" + "9" * 1000,
        "metrics?after_step=1.5",
        "metrics?max_points=0",
        "metrics?max_points=10001",
        "metrics?columns=absent",
        "metrics?columns=",
        "metrics?columns=loss,__class__",
        "events?after=nan",
        "events?after=inf",
        "events?limit=0",
        "events?limit=10001",
        "samples?step=-1",
        "samples?step=..%2f..%2fsecret",
        "samples?step=2147483648",
        "samples?step=" + "9" * 1500,
    ],
)
def test_a_bad_parameter_is_named(served: Served, query: str) -> None:
    name = query.partition("?")[2].partition("=")[0]
    line = refused(served.get(f"/api/runs/one/{query}"), 422)
    assert line.startswith(f"{name}: found ")
    assert len(line) < 300


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=all", "offset=-1"])
def test_a_page_of_the_listing_is_bounded(served: Served, query: str) -> None:
    assert refused(served.get(f"/api/runs?{query}"), 422).startswith(query.partition("=")[0])


def test_too_long_a_request_is_refused(served: Served) -> None:
    assert "query" in refused(served.get("/api/runs?a=" + "x" * 3000), 413)
    assert "query" in refused(served.ask("GET", "/healthz?" + "x" * 3000), 413)
    assert "path" in refused(served.get("/api/runs/" + "x" * 3000), 413)
    for start in (b"GET /", b"GET / HTTP/1.1\r\nHost: here\r\nCookie: "):  # and no end of it
        assert served.send(start + b"x" * 20_000).status == 400
    token = with_token(f"Bearer {TOKEN}")
    for length in ("1025", "99999999999999999999999"):
        answer = served.ask("POST", "/api/runs/one/cancel", {**token, "Content-Length": length})
        assert answer.status in (400, 413)
    with served.connect() as connection:  # a body that never ends, of no announced length
        head = f"POST /api/runs/one/cancel HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {TOKEN}"
        connection.sendall(f"{head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        assert b" 200 " in connection.recv(1 << 16)


@pytest.mark.parametrize(
    "request_",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /api/runs HTTP/9.9\r\nConnection: close\r\n\r\n",
        b"GET /api/runs HTTP/1.1\r\n\r\n",
        b"GET /api/runs HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET \x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=lambda request: repr(request)[:30],
)
def test_what_is_not_http_is_refused(served: Served, request_: bytes) -> None:
    assert served.send(request_).status in (400, 401)


def test_wrong_methods_are_405_and_change_nothing(served: Served) -> None:
    token = with_token(f"Bearer {TOKEN}")
    before = sorted(path.name for path in Path(served.root).rglob("*"))
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        for path in ("/api/runs", "/api/runs/one", "/api/runs/one/metrics", "/metrics"):
            answer = served.ask(method, path, token)
            refused(answer, 405)
            assert answer.headers["allow"] == "GET"
    answer = served.get("/api/runs/one/cancel")
    refused(answer, 405)
    assert sorted(path.name for path in Path(served.root).rglob("*")) == before


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


def test_a_client_that_dawdles_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_server.Impatient, "head_s", 0.2)
    with served.connect() as silent, served.connect() as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert silent.recv(1) == b""
        with suppress(ConnectionResetError):
            assert slow.recv(1) == b""


def test_a_client_that_does_not_read_is_cut_off(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metrics(Path(served.root) / "one", 3000)
    whole = len(served.get("/api/runs/one/metrics").body)
    given_up, late = threading.Event(), api_server.Impatient._late

    def seen(connection: api_server.Impatient) -> None:
        late(connection)
        given_up.set()

    monkeypatch.setattr(api_server.Impatient, "_late", seen)
    monkeypatch.setattr(api_server.Impatient, "answer_s", 0.5)
    head = f"GET /api/runs/one/metrics HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    asked, received = 60, 0  # more than the kernel's buffers hold
    with served.connect() as connection:
        connection.sendall(head.encode() * asked)
        assert given_up.wait(WAIT_S)
        with suppress(ConnectionResetError):
            while piece := connection.recv(1 << 20):
                received += len(piece)
    assert received < asked * whole / 2


def test_an_error_of_the_service_itself_is_one_line_and_no_traceback(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError(CANARY)

    monkeypatch.setattr(api_read.Runs, "listing", broken)
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        answer = served.get("/api/runs")
    assert (answer.status, answer.headers["x-content-type-options"]) == (500, "nosniff")
    assert CANARY.encode() not in answer.body
    assert TOKEN not in caplog.text
