"""Commands that follow a run: its status until it ends, and its log."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.live import Live

from tip_ray.commands.look import status_rows, status_styles
from tip_ray.commands.output import pairs_table, printable, warn
from tip_ray.commands.reach import reach
from tip_ray.contract.errors import NotFoundError
from tip_ray.contract.run_state import ObservedStatus
from tip_ray.control.progress import TerminalProgress, percent, result_lines
from tip_ray.control.run_directory import REPORT
from tip_ray.service.client_run import DirectoryRun, Run, exit_code, follow


def watch(options: argparse.Namespace) -> int:
    """Follow a run to its end; the exit code is that of the run's own process.

    Raises:
        RunFailedError: its driver has been silent for so long that it is lost.
    """
    return follow_to_end(reach(options))


def follow_to_end(run: Run) -> int:
    """Show what `run` does until it has ended; returns its exit code. Errors: as `watch`."""
    console = Console(highlight=False, soft_wrap=True)
    ended = _in_place(run, console) if console.is_terminal else _by_lines(run, console)
    if isinstance(run, DirectoryRun):
        report = f"{run.url}/{REPORT}" if run.storage.exists(REPORT) else None
        TerminalProgress(console).finish(ended, run.url, report)
    else:
        for line in result_lines(ended, run.url, None):
            console.print(line)
    return exit_code(ended)


def watch_line(found: ObservedStatus) -> str:
    """`RUNNING  step 7/40  loss 0.1234  kept 50.0%  accuracy 71.9%`."""
    parts = [_state(found), f"step {found.step}/{found.steps}"]
    if found.loss is not None:
        parts.append(f"loss {found.loss:.4f}")
        parts.append(f"kept {percent(found.kept_fraction)}")
    if found.accuracy is not None:
        parts.append(f"accuracy {percent(found.accuracy)}")
    if found.waiting_for:
        parts.append(f"waits for {found.waiting_for}")
    return printable("  ".join(parts))


def _state(found: ObservedStatus) -> str:
    quiet = found.health in ("live", "ended")
    return found.state.value if quiet else f"{found.state.value}, {found.health}"


def _by_lines(run: Run, console: Console) -> ObservedStatus:
    """A line whenever something has changed."""
    last = ""
    for found in follow(run, notice=warn):
        line = watch_line(found)
        if line != last and not found.state.ended:
            console.print(line, markup=False)
            console.file.flush()  # a pipe would hold it back
        last = line
    return found


def _in_place(run: Run, console: Console) -> ObservedStatus:
    """The status in place, gone when the run has ended."""
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for found in follow(run, notice=warn):
            rows = status_rows(found, run.url)
            live.update(pairs_table(rows, status_styles(found)), refresh=True)
    return found


def logs(options: argparse.Namespace) -> int:
    """The driver's log, as far as it is written."""
    run = reach(options)
    try:
        text = run.read_log()
    except NotFoundError:
        raise NotFoundError(f"{run.run_id}: no log yet; see `tip-ray status`") from None
    sys.stdout.write(printable(text))
    return 0
