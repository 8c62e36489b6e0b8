"""What every request passes, whatever its path: the token, limits, security headers, counters."""

from __future__ import annotations

import secrets
import time
from typing import Protocol

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tip_ray.contract.errors import SpecError

OPEN_PATHS = frozenset({"/", "/healthz", "/openapi.json"})
PAGE_PATH = "/page/"
TARGET_BYTES = 2048  # of a path, and of a query
BODY_BYTES = 1024  # no request needs one

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Counters(Protocol):
    """Hears of every answer."""

    def answered(self, route: str, method: str, status: int, seconds: float) -> None: ...


class Guard:
    """Wraps the whole application, so that no route and no error can do without it.

    What is not expressly open needs the token: a path that is new, or unknown, is closed.
    """

    def __init__(self, app: ASGIApp, token: str, counters: Counters) -> None:
        self.app = app
        self._token = check_token(token).encode("ascii")
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _secure(message, scope["path"])
            await send(message)

        try:
            await (self._refusal(scope) or self.app)(scope, receive, send_guarded)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - began
            self._counters.answered(route, scope["method"], status, seconds)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        path, headers = scope["path"], scope["headers"]
        if not (path in OPEN_PATHS or path.startswith(PAGE_PATH)) and not self._allowed(headers):
            line = "Authorization: found no valid token, expected `Bearer TOKEN`"
            cure = "give the token that `tip-ray serve` was started with"
            return _answer(401, f"{line}; {cure}", {"WWW-Authenticate": "Bearer"})
        for part in ("raw_path", "query_string"):
            if len(scope.get(part) or b"") > TARGET_BYTES:
                return _answer(413, f"{part}: found over {TARGET_BYTES} bytes; ask for less")
        if "\\" in path or not path.isprintable():
            return _answer(404, "path: found a character that no path here has")
        if _body_bytes(headers) > BODY_BYTES:
            return _answer(413, f"body: found over {BODY_BYTES} bytes, expected none")
        return None

    def _allowed(self, headers: list[tuple[bytes, bytes]]) -> bool:
        found = [value for name, value in headers if name == b"authorization"]
        if len(found) != 1:
            return False
        scheme, _, given = found[0].partition(b" ")
        return secrets.compare_digest(given.strip(), self._token) and scheme.lower() == b"bearer"


def check_token(token: str) -> str:
    """`token` itself.

    Raises:
        SpecError: it cannot be sent in a header.
    """
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        expected = "printable ASCII without spaces, in one line"
        raise SpecError("token", "an unusable one" if token else "none", expected)
    return token


def _answer(status: int, line: str, headers: dict[str, str] | None = None) -> ASGIApp:
    return JSONResponse({"error": line}, status, headers)


def _body_bytes(headers: list[tuple[bytes, bytes]]) -> int:
    """As announced; a body of unannounced length is never read."""
    for name, value in headers:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 19 else BODY_BYTES + 1
    return 0


def _secure(message: Message, path: str) -> None:
    headers = MutableHeaders(raw=message["headers"])
    for name, value in SECURITY_HEADERS.items():
        headers[name] = value
    no_store = path.startswith(("/api", "/metrics"))
    headers.setdefault("Cache-Control", "no-store" if no_store else "no-cache")
    message["headers"] = headers.raw
