"""The run that RUN names: an id under a run root, a run directory, or an id at a status API."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from tip_ray.commands.begin import from_here
from tip_ray.commands.output import warn
from tip_ray.contract.errors import NotSupportedError, SpecError
from tip_ray.contract.run_state import ObservedStatus, observe
from tip_ray.control.run_reader import default_run_roots, list_runs, resolve_run
from tip_ray.service.client_run import DirectoryRun, Run

if TYPE_CHECKING:
    from tip_ray.service.client_http import HttpRuns


def reach(options: argparse.Namespace, run: str | None = None) -> Run:
    """`run`, by default RUN, under --run-root or at --url."""
    run = options.run if run is None else run
    runs = _status_api(options)
    return runs.run(run) if runs is not None else _directory(options, run)


def reach_directory(options: argparse.Namespace) -> DirectoryRun:
    """RUN, for what only the run's own files can tell."""
    if _status_api(options) is not None:
        raise NotSupportedError(
            f"{options.command} needs the run's files, which a status API does not send; give "
            f"--run-root, or the run directory's URL as RUN"
        )
    return _directory(options, options.run)


def reach_all(options: argparse.Namespace) -> tuple[list[ObservedStatus], str]:
    """All runs, newest first, and where they were looked for."""
    runs = _status_api(options)
    if runs is not None:
        return runs.runs(), options.url
    roots = [from_here(options.run_root)] if options.run_root else default_run_roots()
    now = time.time()
    found = [observe(status, now) for root in roots for status in list_runs(root, warn)]
    return found, " or ".join(roots)


def _directory(options: argparse.Namespace, run: str) -> DirectoryRun:
    root = from_here(options.run_root) if options.run_root else None
    return DirectoryRun(resolve_run(run, root).url)


def _status_api(options: argparse.Namespace) -> HttpRuns | None:
    if options.url is None:
        if options.token_file is not None:
            raise SpecError("--token-file", "no --url", "the status API that the token is for")
        return None
    if options.run_root:
        raise SpecError("--run-root", "--url beside it", "one of them: a status API has its own")
    from tip_ray.service.client import http_runs

    return http_runs(options.url, options.token_file, notice=warn)
