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

from tip_ray.commands.output import printable, write, write_pairs, write_table
from tip_ray.commands.reach import reach, reach_all
from tip_ray.contract.run_state import ObservedStatus, RunState
from tip_ray.control.progress import duration, percent, shortest, size

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
    run = reach(options)
    found = run.read_status()
    if options.json:
        write(json.dumps({**found.model_dump(mode="json"), "directory": run.url}, indent=2))
    else:
        write_pairs(status_rows(found, run.url), status_styles(found))
    return 0


def status_rows(found: ObservedStatus, directory: str) -> list[tuple[str, str]]:
    """(what, value) of everything that is known."""
    state = found.state.value if found.health == "ended" else f"{found.state.value}, {found.health}"
    if found.health in ("stale", "lost"):
        state += f": no sign of life for {duration(found.heartbeat_age_s)}"
    seen_at = found.heartbeat_at + found.heartbeat_age_s
    until = found.updated_at if found.health == "ended" else seen_at
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


def _accuracy(found: ObservedStatus) -> str:
    if found.accuracy is None:
        return percent(None)
    return f"{percent(found.accuracy)} ({percent(found.initial_accuracy)} at first)"


def status_styles(found: ObservedStatus) -> dict[str, str]:
    """Colours of `status_rows`."""
    silent = found.health in ("stale", "lost")
    return {"state": "bold red" if silent else _STATE_STYLES.get(found.state, "bold")}


def list_all(options: argparse.Namespace) -> int:
    """All runs under the root."""
    runs, where = reach_all(options)
    if not runs:
        sys.stderr.write(f"no runs under {where}\n")
        return 0
    rows = [
        (
            run.run_id,
            run.state.value if run.state.ended else f"{run.state.value}, {run.health}",
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
    table = reach(options).read_metrics()
    if options.format == "csv":
        import pyarrow.csv

        sys.stdout.flush()
        pyarrow.csv.write_csv(table, sys.stdout.buffer)
    elif options.format == "json":
        rows = [{k: _finite(v) for k, v in row.items()} for row in table.to_pylist()]
        write(json.dumps(rows, indent=1))
    else:
        cells = [_cells(row) for row in table.to_pylist()]
        write_table(tuple(_SHOWN.values()), cells, "; --format csv has all")
    return 0


def samples(options: argparse.Namespace) -> int:
    """Rollouts with the tokens that the learner saw marked."""
    table = reach(options).read_samples(options.step)
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

    runs = [reach(options, run) for run in options.run]
    write(shortest(write_report(runs, options.output)))
    return 0


def cancel(options: argparse.Namespace) -> int:
    """Ask the driver to stop after its step."""
    run = reach(options)
    if run.cancel():
        write(f"{run.run_id}: will stop after its step and a checkpoint")
    else:
        write(f"{run.run_id}: has ended already: {run.read_status().state.value}")
    return 0


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
