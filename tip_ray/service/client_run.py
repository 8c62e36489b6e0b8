"""One run, from wherever it is read: what commands and `RunClient` need of it, and following it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from tip_ray.contract.errors import NotInTimeError, RunFailedError, UnreachableError
from tip_ray.contract.run_state import (
    LOST_AFTER_S,
    EvaluationResult,
    ObservedStatus,
    RunState,
    observe,
)
from tip_ray.control.progress import duration
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader

POLL_S = 1.0
FAILED_EXIT, CANCELLED_EXIT = 1, 130
Notice = Callable[[str], None]

# Change with every heartbeat, whatever the run does.
_BEATS = {"heartbeat_at", "heartbeat_age_s", "updated_at"}
_log = logging.getLogger(__name__)


def log_notice(text: str) -> None:
    """What is worth a line but no error goes to the log, which shows it on stderr by default."""
    _log.warning("%s", text)


class Run(Protocol):
    """A run in a directory, on a cluster or behind a status API. Every method reads anew.

    All raise NotFoundError where there is none, RunDirectoryError where a file of it is broken,
    UnreachableError where who should know does not answer.
    """

    @property
    def run_id(self) -> str: ...

    @property
    def url(self) -> str:
        """Where its files are, or where it is answered for."""
        ...

    def read_status(self) -> ObservedStatus: ...

    def read_spec(self) -> dict[str, Any]: ...

    def read_metrics(self) -> pa.Table: ...

    def read_events(self) -> list[dict[str, Any]]: ...

    def read_evaluations(self) -> list[EvaluationResult]: ...

    def sample_steps(self) -> list[int]: ...

    def read_samples(self, step: int | None = None) -> pa.Table: ...

    def read_log(self) -> str:
        """What its driver said."""
        ...

    def cancel(self) -> bool:
        """Ask it to stop after its step and a checkpoint; False if it has ended already."""
        ...


class DirectoryRun(RunReader):
    """A run by its directory alone."""

    def read_status(self) -> ObservedStatus:
        return observe(super().read_status(), time.time())

    def cancel(self) -> bool:
        if self.read_status().state.ended:
            return False
        RunDirectory(self.storage, self.run_id).request_cancel()
        return True


def exit_code(ended: ObservedStatus) -> int:
    """Of the driver's process, as it wrote it down or as its last state tells."""
    if ended.exit_code is not None:
        return ended.exit_code
    return {RunState.SUCCEEDED: 0, RunState.CANCELLED: CANCELLED_EXIT}.get(ended.state, FAILED_EXIT)


def follow(
    run: Run, *, poll_s: float = POLL_S, timeout_s: float | None = None, notice: Notice = log_notice
) -> Iterator[ObservedStatus]:
    """Its status, read every `poll_s` seconds until it has ended; that one comes last.

    Silence of a server that has answered before is borne for as long as a driver's.

    Raises:
        RunFailedError: its driver has been silent for so long that it is lost.
        NotInTimeError: it has not ended within `timeout_s`.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    patience = _Patience(notice)
    while True:
        found = patience.read(run)
        if found is not None:
            yield found
            if found.state.ended:
                return
            _refuse_lost(found)
        if deadline is not None and time.monotonic() + poll_s > deadline:
            raise NotInTimeError(
                f"{run.run_id}: has not ended within {timeout_s:g} s; it goes on by itself"
            )
        time.sleep(poll_s)


def changes(statuses: Iterator[ObservedStatus]) -> Iterator[ObservedStatus]:
    """Those that differ from the one before in more than a heartbeat."""
    before = None
    for found in statuses:
        content = found.model_dump(exclude=_BEATS)
        if content != before:
            yield found
        before = content


class _Patience:
    """Bears a server's silence, and says so once."""

    def __init__(self, notice: Notice) -> None:
        self._notice = notice
        self._answered_at: float | None = None
        self._silent = False

    def read(self, run: Run) -> ObservedStatus | None:
        try:
            found = run.read_status()
        except UnreachableError as error:
            now = time.monotonic()
            if self._answered_at is None or now - self._answered_at > LOST_AFTER_S:
                raise
            if not self._silent:
                self._notice(f"{error}; waiting for it")
            self._silent = True
            return None
        self._answered_at, self._silent = time.monotonic(), False
        return found


def _refuse_lost(found: ObservedStatus) -> None:
    if found.health == "lost":
        raise RunFailedError(
            f"{found.run_id}: no sign of life for {duration(found.heartbeat_age_s)}; start it "
            f"again with --run-id {found.run_id} to go on from its checkpoint"
        )
