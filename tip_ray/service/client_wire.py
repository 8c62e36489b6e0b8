"""HTTP to one server: a bearer token, deadlines, repeats where they are safe, one-line errors."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import requests

from tip_ray.contract.errors import AccessError, SpecError, UnreachableError

JSON = "application/json"
_CONNECT_S = 5.0
_TRIES = 3
_PAUSE_S = 0.3  # before the second try; twice as long before each further one
_TRY_AGAIN = frozenset({502, 503, 504})
_SHOWN = 300  # characters of a server's own words
_LOST = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)
_ERRNO = re.compile(r"\[Errno -?\d+\] ([^'\")\]]+)")


class Wire:
    """Requests to the server at `url`; each call ends within about `timeout_s`.

    Args:
        what: what the server is, for errors, e.g. "the cluster".
        token_cure: how to give the right token, for errors.

    Raises:
        SpecError: `url` is not an http(s) address.
    """

    def __init__(
        self, url: str, token: str | None, *, what: str, token_cure: str, timeout_s: float
    ) -> None:
        self.url = checked_url(url)
        self.timeout_s = timeout_s
        self._what, self._token, self._token_cure = what, token, token_cure
        self._session = requests.Session()
        self._session.auth = self._authorized  # else an entry in ~/.netrc takes its place

    def get(
        self, path: str, *, params: Mapping[str, Any] | None = None, accept: str = JSON
    ) -> requests.Response:
        """Repeated a few times where nothing answers. Errors: as `send`."""
        return self.send("GET", path, repeat=True, params=params, headers={"Accept": accept})

    def send(self, method: str, path: str, *, repeat: bool, **request: Any) -> requests.Response:
        """The server's answer, whatever its status but a refused token or a redirection.

        Args:
            repeat: sending it twice does no harm.

        Raises:
            UnreachableError: nothing answered in time.
            AccessError: 401 or 403.
        """
        deadline, pause_s = time.monotonic() + self.timeout_s, _PAUSE_S
        for left in reversed(range(_TRIES if repeat else 1)):
            last = left == 0 or time.monotonic() + pause_s >= deadline
            try:
                answer = self._once(method, path, deadline, request)
            except _LOST as error:
                if last:
                    raise self.unreachable(_reason(error)) from None
            else:
                if last or answer.status_code not in _TRY_AGAIN:
                    return self._allowed(answer)
            time.sleep(pause_s)
            pause_s *= 2
        raise AssertionError("the last try returns or raises")

    def good(self, answer: requests.Response) -> requests.Response:
        """Raises UnreachableError if the server could not do what it was asked for."""
        if not answer.ok:
            raise self.unreachable(f"answers {answer.status_code}: {said(answer)}")
        return answer

    def json(self, answer: requests.Response) -> Any:
        """The body of a good answer; raises UnreachableError if there is none."""
        try:
            return self.good(answer).json()
        except requests.exceptions.JSONDecodeError:
            raise self.unreachable("answers with something that is not JSON") from None

    def unreachable(self, found: str) -> UnreachableError:
        return UnreachableError(
            f"{self.url}: {self._what} {found}; is it up, and is this its address?"
        )

    def _once(
        self, method: str, path: str, deadline: float, request: Mapping[str, Any]
    ) -> requests.Response:
        left_s = max(0.1, deadline - time.monotonic())
        timeout = (min(_CONNECT_S, left_s), left_s)
        return self._session.request(
            method, f"{self.url}{path}", timeout=timeout, allow_redirects=False, **request
        )

    def _authorized(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _allowed(self, answer: requests.Response) -> requests.Response:
        if answer.status_code in (401, 403):
            found = "the token is wrong" if self._token else "a token is needed, none was given"
            raise AccessError(f"{self.url}: {found} ({answer.status_code}); {self._token_cure}")
        if 300 <= answer.status_code < 400:  # following it would show the token to someone else
            where = said_text(answer.headers.get("Location", "nowhere"))
            raise UnreachableError(
                f"{self.url}: {self._what} sends on to {where}; give its address"
            )
        return answer


def checked_url(url: str) -> str:
    """`url` without a slash at its end.

    Raises:
        SpecError: it is not an http(s) address, or carries a password.
    """
    expected = "http://HOST:PORT or https://HOST"
    try:
        parts = urlsplit(url)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError:
        raise SpecError("address", repr(url), expected) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_one:
        raise SpecError("address", repr(url), expected)
    if "@" in parts.netloc or parts.query or parts.fragment:
        cure = "a token goes into a file"
        raise SpecError("address", "a password or parameters in the URL", expected, cure)
    return url.rstrip("/")


def said(answer: requests.Response) -> str:
    """The server's own words about an error, in one line: the last one of a traceback."""
    try:
        body = answer.json()
    except requests.exceptions.JSONDecodeError:
        lines = [line for line in answer.text.splitlines() if line.strip()]
        return said_text(lines[-1] if lines else answer.reason or "nothing")
    error = body.get("error", body.get("detail")) if isinstance(body, dict) else body
    return said_text(str(error))


def said_text(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "does not answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return f"cannot be trusted ({said_text(str(error))})"
    found = _ERRNO.search(str(error))
    return f"does not answer ({found[1].strip().lower()})" if found else "broke off its answer"
