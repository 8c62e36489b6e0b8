"""The status API against bad tokens, bad requests and slow clients: never a 500, never a wait."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.service.api_served import CANARY, TOKEN, WAIT_S, Served, refused, write_metrics
from tip_ray.service import api_read, api_server


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
