"""Commands that follow a run: its status until it ends, and its log."""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console
from rich.live import Live

from tip_ray.commands.look import duration, resolve, status_rows, status_styles
from tip_ray.commands.output import pairs_table, printable
from tip_ray.contract.errors import NotFoundError, RunFailedError
from tip_ray.contract.run_state import RunState, RunStatus
from tip_ray.control.progress import TerminalProgress, percent
from tip_ray.control.run_directory import REPORT
from tip_ray.control.run_reader import RunReader

POLL_S = 1.0
FAILED_EXIT, CANCELLED_EXIT = 1, 130


def watch(options: argparse.Namespace) -> int:
    """Follow a run to its end; the exit code is that of the run's own process.

    Raises:
        RunFailedError: its driver has been silent for so long that it is lost.
    """
    reader = resolve(options)
    console = Console(highlight=False, soft_wrap=True)
    ended = _follow_live(reader, console) if console.is_terminal else _follow(reader, console)
    report = f"{reader.url}/{REPORT}" if reader.storage.exists(REPORT) else None
    TerminalProgress(console).finish(ended, reader.url, report)
    return exit_code(ended)


def exit_code(ended: RunStatus) -> int:
    """Of the driver's process, as it wrote it down or as its last state tells."""
    if ended.exit_code is not None:
        return ended.exit_code
    return {RunState.SUCCEEDED: 0, RunState.CANCELLED: CANCELLED_EXIT}.get(ended.state, FAILED_EXIT)


def watch_line(found: RunStatus, now: float) -> str:
    """`RUNNING  step 7/40  loss 0.1234  kept 50.0%  accuracy 71.9%`."""
    parts = [_state(found, now), f"step {found.step}/{found.steps}"]
    if found.loss is not None:
        parts.append(f"loss {found.loss:.4f}")
        parts.append(f"kept {percent(found.kept_fraction)}")
    if found.accuracy is not None:
        parts.append(f"accuracy {percent(found.accuracy)}")
    if found.waiting_for:
        parts.append(f"waits for {found.waiting_for}")
    return printable("  ".join(parts))


def _state(found: RunStatus, now: float) -> str:
    health = found.health_at(now)
    return found.state.value if health in ("live", "ended") else f"{found.state.value}, {health}"


def _follow(reader: RunReader, console: Console) -> RunStatus:
    """A line whenever something has changed."""
    last = ""
    while True:
        found, now = reader.read_status(), time.time()
        if found.state.ended:
            return found
        line = watch_line(found, now)
        if line != last:
            console.print(line, markup=False)
            console.file.flush()  # a pipe would hold it back
        last = line
        _refuse_lost(found, now)
        time.sleep(POLL_S)


def _follow_live(reader: RunReader, console: Console) -> RunStatus:
    """The status in place, gone when the run has ended."""
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            found, now = reader.read_status(), time.time()
            if found.state.ended:
                return found
            rows = status_rows(found, reader.url, now)
            live.update(pairs_table(rows, status_styles(found, now)), refresh=True)
            _refuse_lost(found, now)
            time.sleep(POLL_S)


def _refuse_lost(found: RunStatus, now: float) -> None:
    if found.health_at(now) == "lost":
        silent = duration(now - found.heartbeat_at)
        cure = f"start it again with --run-id {found.run_id} to go on from its checkpoint"
        raise RunFailedError(f"{found.run_id}: no sign of life for {silent}; {cure}")


def logs(options: argparse.Namespace) -> int:
    """The driver's log, as far as it is written."""
    reader = resolve(options)
    try:
        text = reader.read_log()
    except NotFoundError:
        raise NotFoundError(f"{reader.run_id}: no log yet; see `tip-ray status`") from None
    sys.stdout.write(printable(text))
    return 0
