"""The status API behind uvicorn: its socket, its limits, and an end to whoever is too slow."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tip_ray.contract.errors import SpecError

HEAD_S = 15.0  # from the connection, or a request's first byte, to the end of its head
ANSWER_S = 120.0  # from there until the last byte of the answer has left
_IDLE_S = 5  # a connection that is kept for the next request
_HEAD_BYTES = 16 * 1024
_CONNECTIONS = 256  # beyond: 503
_SHUTDOWN_S = 5


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        SpecError: the address cannot be listened at.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=kind, backlog=_CONNECTIONS)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        found, expected = f"{host}:{port} ({reason})", "an address of this machine that is free"
        raise SpecError("--host, --port", found, expected, "choose another") from None


def make_server(app: ASGIApp) -> uvicorn.Server:
    """`run(sockets=[...])` answers until SIGINT or SIGTERM, which it raises again at its end.

    No access log: what it would show, the counters at /metrics do; and no request is ever logged.
    """
    config = uvicorn.Config(
        app,
        http=Impatient,
        ws="none",
        lifespan="on",
        log_level="error",  # a warning is one for each bad request
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    return uvicorn.Server(config)


class Impatient(H11Protocol):
    """Uvicorn times only connections between requests: this cuts those off that dawdle in one."""

    head_s, answer_s = HEAD_S, ANSWER_S
    _timer: asyncio.TimerHandle | None = None
    _begun = False  # a request, be it by a single byte
    _answering = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        if not self._begun:
            self._begin()
        super().data_received(data)
        self._note_head()

    def on_response_complete(self) -> None:
        self._begun = self._answering = False  # the timer goes on until the answer has left
        super().on_response_complete()  # begins with what was sent ahead
        self._note_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(None)
        super().connection_lost(exc)

    def _begin(self) -> None:
        self._begun = True
        self._set_timer(self.head_s)

    def _note_head(self) -> None:
        in_progress = self.cycle is not None and not self.cycle.response_complete
        if in_progress and not self._answering:
            self._begun = self._answering = True
            self._set_timer(self.answer_s)

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self._begun or self.transport.get_write_buffer_size():
            self.transport.abort()
