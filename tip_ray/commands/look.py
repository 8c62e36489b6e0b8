"""Commands that look at runs: status, list, metrics, samples, report, cancel."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.text import Text

from tip_ray.commands.begin import from_here
from tip_ray.commands.output import printable, warn, write, write_pairs, write_table
from tip_ray.contract.run_state import RunState, RunStatus, observe
from tip_ray.control.progress import percent, shortest, size
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader, default_run_roots, list_runs, resolve_run

# The columns of `metrics` as a table, those that a narrow terminal shows first; csv and json have
# them all.
_SHOWN = {
    "step": "step",
    "loss": "loss",
    "kept_fraction": "kept",
    "reverse_kl_mean": "reverse KL",
    "student_entropy_mean": "entropy",
    "seconds_step": "seconds",
    "response_length_mean": "length",
    "bytes_cut_to_learner": "to learner",
    "grad_norm": "grad norm",
    "lag": "lag",
}
_STATE_STYLES = {
    RunState.SUCCEEDED: "bold green",
    RunState.FAILED: "bold red",
    RunState.CANCELLED: "bold yellow",
}


def status(options: argparse.Namespace) -> int:
    """One run's status, for people or as JSON."""
    reader = resolve(options)
    found, now = reader.read_status(), time.time()
    if options.json:
        observed = observe(found, now).model_dump(mode="json")
        write(json.dumps({**observed, "directory": reader.url}, indent=2))
        return 0
    write_pairs(status_rows(found, reader.url, now), status_styles(found, now))
    return 0


def status_rows(found: RunStatus, directory: str, now: float) -> list[tuple[str, str]]:
    """(what, value) of everything that is known."""
    health = found.health_at(now)
    state = found.state.value if health == "ended" else f"{found.state.value}, {health}"
    if health in ("stale", "lost"):
        state += f": no sign of life for {duration(now - found.heartbeat_at)}"
    until = found.updated_at if health == "ended" else now
    rows = [
        ("run", found.run_id),
        ("state", state),
        ("step", f"{found.step}/{found.steps}"),
        ("for", duration(until - found.started_at)),
        ("loss", "-" if found.loss is None else f"{found.loss:.4f}"),
        ("accuracy", _accuracy(found)),
        ("kept", percent(found.kept_fraction)),
        ("to learner", f"{size(found.bytes_shipped)} of {size(found.bytes_unpruned)} unpruned"),
        ("directory", shortest(directory)),
    ]
    counts = {
        "prompts skipped": found.prompts_skipped,
        "quarantined": found.rollouts_quarantined,
        "updates skipped": found.updates_skipped,
        "recoveries": found.recoveries,
    }
    rows += [(name, str(count)) for name, count in counts.items() if count]
    rows += [("waits for", found.waiting_for)] if found.waiting_for else []
    return rows + ([("error", found.error)] if found.error else [])


def _accuracy(found: RunStatus) -> str:
    if found.accuracy is None:
        return percent(None)
    return f"{percent(found.accuracy)} ({percent(found.initial_accuracy)} at first)"


def status_styles(found: RunStatus, now: float) -> dict[str, str]:
    """Colours of `status_rows`."""
    silent = found.health_at(now) in ("stale", "lost")
    return {"state": "bold red" if silent else _STATE_STYLES.get(found.state, "bold")}


def list_all(options: argparse.Namespace) -> int:
    """All runs under the root."""
    roots = [from_here(options.run_root)] if options.run_root else default_run_roots()
    runs = [run for root in roots for run in list_runs(root, warn)]
    if not runs:
        sys.stderr.write(f"no runs under {' or '.join(roots)}\n")
        return 0
    now = time.time()
    rows = [
        (
            run.run_id,
            run.state.value if run.state.ended else f"{run.state.value}, {run.health_at(now)}",
            f"{run.step}/{run.steps}",
            percent(run.accuracy),
            percent(run.kept_fraction),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started_at)),
        )
        for run in runs
    ]
    write_table(("RUN", "STATE", "STEP", "ACCURACY", "KEPT", "STARTED"), rows)
    return 0


def metrics(options: argparse.Namespace) -> int:
    """One row a step."""
    table = resolve(options).read_metrics()
    if options.format == "csv":
        import pyarrow.csv

        sys.stdout.flush()
        pyarrow.csv.write_csv(table, sys.stdout.buffer)
    elif options.format == "json":
        rows = [{k: _finite(v) for k, v in row.items()} for row in table.to_pylist()]
        write(json.dumps(rows, indent=1))
    else:
        rows = [_cells(row) for row in table.to_pylist()]
        write_table(tuple(_SHOWN.values()), rows, "; --format csv has all")
    return 0


def samples(options: argparse.Namespace) -> int:
    """Rollouts with the tokens that the learner saw marked."""
    table = resolve(options).read_samples(options.step)
    console = Console(highlight=False)
    write("tokens that the learner saw stand [in brackets]")
    for row in table.to_pylist():
        write("")
        for text in (Text(_sample_title(row), "bold"), Text(printable(row["prompt_text"]))):
            console.print(text, soft_wrap=not console.is_terminal)
        console.print(_marked(row), soft_wrap=True)
    return 0


def report(options: argparse.Namespace) -> int:
    """A self-contained page; several runs are laid over each other."""
    from tip_ray.service.report import write_report

    root = from_here(options.run_root) if options.run_root else None
    readers = [resolve_run(run, root) for run in options.run]
    write(shortest(write_report(readers, options.output)))
    return 0


def cancel(options: argparse.Namespace) -> int:
    """Ask the driver to stop after its step."""
    reader = resolve(options)
    state = reader.read_status().state
    if state.ended:
        write(f"{reader.run_id}: has ended already: {state.value}")
        return 0
    RunDirectory(reader.storage, reader.run_id).request_cancel()
    write(f"{reader.run_id}: will stop after its step and a checkpoint")
    return 0


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 07 s` or `12 s`."""
    whole = max(0, int(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def resolve(options: argparse.Namespace) -> RunReader:
    """The run that RUN and --run-root name."""
    return resolve_run(options.run, from_here(options.run_root) if options.run_root else None)


def _cells(row: dict[str, Any]) -> list[str]:
    shown = []
    for name in _SHOWN:
        value = row[name]
        if name.startswith("bytes"):
            shown.append(size(value))
        elif name == "kept_fraction":
            shown.append(percent(value))
        else:
            shown.append(f"{value:.4g}" if isinstance(value, float) else str(value))
    return shown


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sample_title(row: dict[str, Any]) -> str:
    kept, total = sum(row["kept"]), len(row["kept"])
    return (
        f"step {row['step']}, prompt {row['slot']}, sample {row['sample_index']}: "
        f"{kept} of {total} tokens kept, mean reverse KL {_mean(row['reverse_kl']):.3f} nats, "
        f"mean entropy {_mean(row['student_entropy']):.3f} nats, {row['finish_reason']}"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _marked(row: dict[str, Any]) -> Text:
    """A sign as well as a colour: not every eye or terminal has both."""
    text = Text()
    for token, kept in zip(row["text"], row["kept"], strict=True):
        shown = printable(token)
        if kept:
            visible = shown.replace("\n", "\\n")
            text.append(f"[{visible}]", style="bold black on yellow")
            text.append("\n" * shown.count("\n"))
        else:
            text.append(shown, style="dim")
    return text
