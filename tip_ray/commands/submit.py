"""submit: the run as a job of a Ray cluster."""

from __future__ import annotations

import argparse
import os
import sys

from tip_ray.commands.begin import load_spec_of
from tip_ray.commands.follow import follow_to_end
from tip_ray.commands.output import warn, write
from tip_ray.control.run_directory import (
    RUN_ROOT_VARIABLE,
    check_run_id,
    new_run_id,
    resolve_run_root,
)
from tip_ray.service.client import cluster_runs
from tip_ray.service.client_cluster import cluster_run_root

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def submit(options: argparse.Namespace) -> int:
    """Send the spec, then perhaps follow the run; its id is the first line printed."""
    given = None if options.run_id is None else check_run_id(options.run_id)
    spec = load_spec_of(options)
    runs = cluster_runs(
        options.address or _ray_address(),
        _root(spec.run_root),
        options.token_file,
        notice=warn,
    )
    run_id = given or new_run_id(spec.name)
    write(run_id)
    sys.stdout.flush()
    runs.submit(spec, run_id)
    if not options.wait:
        return 0
    try:
        return follow_to_end(runs.run(run_id))
    except KeyboardInterrupt:
        warn(f"{run_id} goes on by itself; stop it with `tip-ray cancel {run_id}`")
        raise


def _ray_address() -> str:
    """Where `ray job submit` would send it; RAY_ADDRESS may also name what takes no jobs."""
    named = [os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
    return next((one for one in named if one.startswith("http")), _DEFAULT_ADDRESS)


def _root(run_root: str) -> str:
    """The spec's root as the cluster is told it; a relative one lies under TIP_RAY_RUN_ROOT."""
    known = os.environ.get(RUN_ROOT_VARIABLE)
    return cluster_run_root(resolve_run_root(run_root) if known else run_root)
