"""One run as a process of its own, its directory, and the processes that it consists of."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.jobs.harness import QUICKSTART, quickstart
from tip_ray.contract.errors import TipRayError
from tip_ray.contract.run_state import RunState, RunStatus
from tip_ray.contract.spec import RunSpec
from tip_ray.control.audit import AuditResult, check_audit
from tip_ray.control.run_reader import RunReader

LOOK_EVERY_S = 0.05
DISK_BYTES = 1 << 28
START_S = 400.0  # a first start on a busy machine can take minutes

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # a busy machine starves nice workers
    "HF_HUB_OFFLINE": "1",
}
# Small steps on the tiny pair, so that a fault meets every stage.
SMALL = {
    "rollout.engine": "transformers",
    "prompts.prompts_per_step": 8,
    "checkpoint.every_steps": 3,
    "evaluation": [],
    "faults.item_timeout_s": 25,
    "faults.max_tries": 10,
    "faults.max_learner_restarts": 1000,
    "faults.max_quarantined_fraction": 0.3,
}


class Job:
    """A run that is started, lost and started again under one run id."""

    def __init__(
        self,
        root: Path,
        run_id: str,
        overrides: dict[str, Any],
        *,
        address: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.run_id, self.path = run_id, root / run_id
        self.overrides = {**SMALL, **overrides}
        self._root, self._address = root, address
        self.environment = environment or {}
        self.output = root / f"{run_id}.txt"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def spec(self) -> RunSpec:
        return quickstart(**{k.replace(".", "__"): v for k, v in self.overrides.items()})

    @property
    def reader(self) -> RunReader:
        return RunReader(str(self.path))

    def start(self) -> None:
        """Begin the run, or go on with it."""
        sets = [f"--set={key}={value}" for key, value in self.overrides.items()]
        place = ["--run-id", self.run_id, "--run-root", str(self._root)]
        address = ["--ray-address", self._address] if self._address else []
        command = [sys.executable, "-m", "tests.faults.driver", "run", str(QUICKSTART)]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *sets, *place, *address],
                stdout=output,
                stderr=output,
                env={**os.environ, **ENVIRONMENT, **self.environment},
            )

    def status(self) -> RunStatus | None:
        """None where it cannot be read."""
        with suppress(TipRayError):
            return self.reader.read_status()
        return None

    def running(self, *, epoch: int = 1, step: int = 0) -> bool:
        status = self.status()
        return (
            status is not None
            and status.state is RunState.RUNNING
            and status.epoch >= epoch
            and status.step >= step
        )

    def wait_for(self, what: Callable[[], Any], timeout_s: float) -> bool:
        """Whether `what` came true before the time was over or the driver was gone."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if what():
                return True
            if self.process is None or self.process.poll() is not None:
                return bool(what())
            time.sleep(LOOK_EVERY_S)
        return False

    def finish(self, timeout_s: float) -> int:
        """The driver's exit code."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def events(self, kind: str, since: float) -> list[dict[str, Any]]:
        """Events of a kind from `since` (seconds since 1970) on."""
        with suppress(TipRayError):
            found = self.reader.read_events()
            return [one for one in found if one["kind"] == kind and one["time"] >= since]
        return []

    def check(self) -> AuditResult:
        return check_audit(self.reader, self.spec)

    def kill(self) -> None:
        """SIGKILL to the driver; its private Ray goes with it within seconds."""
        assert self.process is not None
        offspring = processes_of(self.process.pid)
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(offspring, timeout=20)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def processes_of(pid: int) -> list[psutil.Process]:
    """All processes that descend from `pid`."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(name: str, pid: int) -> list[psutil.Process]:
    """Ray workers that descend from `pid`, by what they run, e.g. RolloutActor."""
    found = []
    for process in processes_of(pid):
        with suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
    return found


def send(name: str, pid: int, signum: signal.Signals, draw: random.Random) -> psutil.Process | None:
    """Send a signal to one such worker; None if there is none."""
    found = workers(name, pid)
    if not found:
        return None
    victim = draw.choice(sorted(found, key=lambda one: one.pid))
    with suppress(psutil.NoSuchProcess):
        victim.send_signal(signum)
        return victim
    return None


@contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    """A file stands where `directory` was, at one stroke, so that even root cannot write there."""
    aside = directory.with_name(f"{directory.name}.aside")
    aside.write_bytes(b"")
    _exchange(directory, aside)
    try:
        yield
    finally:
        _exchange(directory, aside)
        aside.unlink()


@contextmanager
def small_disk(root: Path) -> Iterator[None]:
    """`root` is a file system of its own, which can be filled; what it holds stays there after.

    Needs the right to mount: root, or a user namespace (`unshare --map-root-user --mount`).
    """
    kept = root.with_name(f"{root.name}.kept")
    shutil.copytree(root, kept, symlinks=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tip-ray", root], check=True
    )
    try:
        yield
        shutil.copytree(root, kept, symlinks=True, dirs_exist_ok=True)
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)
        shutil.copytree(kept, root, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(kept)


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """The file system of `directory` has no byte left: ENOSPC for everyone."""
    ballast = directory.with_name(f"{directory.name}.ballast")
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    try:
        yield
    finally:
        ballast.unlink()


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, bytes(one), here, bytes(other), exchange):
        raise OSError(ctypes.get_errno(), f"renameat2 {one} {other}")
