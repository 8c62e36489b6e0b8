"""A real `ray start --head` with dashboard and token authentication, in a directory of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import requests

START_S = 180  # Ray's first start on a machine can take a minute and more
_PORTS = (
    "--port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
    "--ray-client-server-port",
)


class Head:
    """The head's processes, its address and its token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = secrets.token_hex(16)
        self.token_file, self.wrong_token_file = folder / "token", folder / "wrong"
        self.token_file.write_text(f"{token}\n")
        self.wrong_token_file.write_text(f"{secrets.token_hex(16)}\n")
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.address = f"http://127.0.0.1:{ports['--dashboard-port']}"
        own = str(Path(sys.executable).parent)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "PATH": f"{own}{os.pathsep}{os.environ['PATH']}",  # where `tip-ray` is
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_TMPDIR": str(folder),
        }
        options = [word for name, port in ports.items() for word in (name, str(port))]
        command = [f"{own}/ray", "start", "--head", "--block", "--num-cpus", "8", *options]
        own_place = ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
        self._log = folder / "head.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *own_place, "--temp-dir", str(folder), "--disable-usage-stats"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        self._known: set[psutil.Process] = set()

    def wait(self) -> None:
        """Until the dashboard answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self._log.read_text()
            try:
                requests.get(f"{self.address}/api/version", timeout=5)
                return
            except requests.ConnectionError:
                time.sleep(0.2)
        raise AssertionError(f"no dashboard within {START_S} s: {self._log.read_text()}")

    def tree(self) -> list[psutil.Process]:
        """Every process that the head has started, and theirs."""
        if self.process.poll() is None:
            self._known |= set(psutil.Process(self.process.pid).children(recursive=True))
        for one in list(self._known):
            with suppress(psutil.NoSuchProcess):
                self._known |= set(one.children(recursive=True))
        return [one for one in self._known if one.is_running() and not _is_zombie(one)]

    def driver(self, run_id: str) -> psutil.Process:
        """The process of a run's driver."""
        for one in self.tree():
            words = _command(one)
            if run_id in words and "run" in words and "python" in Path(words[0]).name:
                return one
        raise AssertionError(f"no driver of {run_id}")

    def stop(self) -> None:
        """End every process, by its id."""
        tree = self.tree()
        self.process.kill()
        while tree:
            for one in tree:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(tree, timeout=20)
            tree = self.tree()
        self.process.wait()


@contextmanager
def running_head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="tip-head-"))
    head = Head(folder)
    try:
        head.wait()
        yield head
    finally:
        head.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [""]
    except psutil.Error:
        return [""]


def _is_zombie(process: psutil.Process) -> bool:
    """Gone, but for whoever does not ask how it ended."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
