"""`tip-ray serve`: the status API and the web page of all runs under a root."""

from __future__ import annotations

import argparse
import ipaddress
import secrets
import socket
import sys

from tip_ray.commands.begin import from_here
from tip_ray.commands.output import warn, write
from tip_ray.service.api import make_app
from tip_ray.service.api_read import Runs
from tip_ray.service.api_server import listen, make_server
from tip_ray.service.client_token import read_token

_GUESSED_SOON = 16  # characters of a token
_SWITCH_S = 0.001  # an answer takes its thread 2 ms: the event loop must not wait for Python's 5


def run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    token = _token(options.token_file)
    root = from_here(options.run_root)
    found = Runs(root).listing()  # a root that cannot be read is told now
    app = make_app(root, token)
    with listen(options.host, options.port) as listening:
        count = len(found.runs)
        write(f"{_url(listening)}  {count} run{'' if count == 1 else 's'} under {root}")
        for line in found.broken:
            warn(line)
        if options.token_file is None:
            write(f"token, until this ends: {token}")
        if not _loopback(listening):
            warn("the token and the runs travel in the clear: put a proxy with TLS in front")
        sys.stdout.flush()
        sys.setswitchinterval(_SWITCH_S)
        make_server(app).run(sockets=[listening])
    return 0


def _token(file: str | None) -> str:
    if file is None:
        return secrets.token_urlsafe(32)
    token = read_token(file)
    if len(token) < _GUESSED_SOON:
        warn(f"--token-file: a token of {len(token)} characters is soon guessed: make it longer")
    return token


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback
