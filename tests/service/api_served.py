"""A status API on a real socket, and requests that no well-behaved client would send."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.runs_made import made_metrics
from tip_ray.control.metrics_parts import METRICS_SCHEMA, to_parquet
from tip_ray.control.run_directory import MERGE_STEPS
from tip_ray.service.api import make_app
from tip_ray.service.api_server import listen, make_server

TOKEN = "a-token-that-nobody-guesses"  # noqa: S105 - of servers that tests start
WAIT_S = 60
CANARY = "sk-this-must-not-be-seen"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one line of a failure."""
        line = self.json()["error"]
        assert "\n" not in line
        return str(line)


@dataclass(frozen=True)
class Served:
    """A service at `port` for the runs under `root`."""

    root: str
    port: int

    def get(self, path: str, **headers: str) -> Answer:
        """With the token."""
        return self.ask("GET", path, {"Authorization": f"Bearer {TOKEN}", **headers})

    def post(self, path: str) -> Answer:
        return self.ask("POST", path, {"Authorization": f"Bearer {TOKEN}"})

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """The path goes over the wire as it is."""
        lines = [f"{method} {path} HTTP/1.1", "Host: here", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        return self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def send(self, request: bytes) -> Answer:
        with self.connect() as connection:
            connection.sendall(request)
            return read_answer(connection)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)


def read_answer(connection: socket.socket) -> Answer:
    """Up to the end of the connection."""
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    headers = {name.lower(): value for name, value in pairs}
    return Answer(int(first.split()[1]), headers, body)


def refused(answer: Answer, *statuses: int) -> str:
    """The line of a failure; its headers are those of every answer."""
    assert answer.status in statuses, answer
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert CANARY.encode() not in answer.body
    return answer.error


def write_metrics(directory: Path, steps: int, **changes: Any) -> None:
    """What a driver has written after `steps`, without its fsyncs: merged parts and single ones."""
    (directory / "metrics").mkdir(parents=True, exist_ok=True)
    rows = [
        made_metrics(step, loss=1 / step, **changes).model_dump() for step in range(1, steps + 1)
    ]
    table = pa.Table.from_pylist(rows, schema=METRICS_SCHEMA)
    merged = steps - steps % MERGE_STEPS
    for first in range(0, merged, MERGE_STEPS):
        name = f"steps-{first + 1:08d}-{first + MERGE_STEPS:08d}.parquet"
        part = to_parquet(table.slice(first, MERGE_STEPS))
        (directory / "metrics" / name).write_bytes(part)
    for step in range(merged, steps):
        name = f"step-{step + 1:08d}.parquet"
        (directory / "metrics" / name).write_bytes(to_parquet(table.slice(step, 1)))


@contextmanager
def serving(root: Path | str) -> Iterator[Served]:
    """The service in a thread of this process, by real uvicorn."""
    app = make_app(str(root), TOKEN)
    with listen("127.0.0.1", 0) as listening:
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            deadline = time.monotonic() + WAIT_S
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            yield Served(str(root), listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
