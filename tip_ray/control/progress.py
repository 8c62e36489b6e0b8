"""What a person sees of a run while it goes: one line a step, and a summary at the end."""

from __future__ import annotations

import os
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from tip_ray.contract.run_state import EvaluationResult, RunState, RunStatus, StepMetrics


class Progress(Protocol):
    """What the driver tells; calls come from one thread."""

    def message(self, text: str) -> None:
        """Something worth a line."""
        ...

    def step(self, metrics: StepMetrics, steps: int, accuracy: float | None) -> None:
        """A step has ended; `accuracy` is the newest of the first evaluation, a fraction."""
        ...

    def evaluation(self, result: EvaluationResult) -> None:
        """An evaluation has ended."""
        ...

    def finish(self, status: RunStatus, directory: str, report: str | None) -> None:
        """The run has ended; nothing is told after this."""
        ...


class SilentProgress:
    """Says nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def step(self, metrics: StepMetrics, steps: int, accuracy: float | None) -> None:
        """Nothing."""

    def evaluation(self, result: EvaluationResult) -> None:
        """Nothing."""

    def finish(self, status: RunStatus, directory: str, report: str | None) -> None:
        """Nothing."""


class TerminalProgress:
    """Lines for a terminal or a log file; on a terminal a live bar stands below them."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._bar: Bar | None = None

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)

    def step(self, metrics: StepMetrics, steps: int, accuracy: float | None) -> None:
        self._console.print(step_line(metrics, steps, accuracy), markup=False)
        self._advance(metrics.step, steps)

    def evaluation(self, result: EvaluationResult) -> None:
        self._console.print(evaluation_line(result), markup=False, style="bold")

    def finish(self, status: RunStatus, directory: str, report: str | None) -> None:
        self.close()
        for line in summary(status, directory, report):
            self._console.print(line)

    def close(self) -> None:
        """Take the live bar away; also where a run ends by an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _advance(self, step: int, steps: int) -> None:
        if not self._console.is_terminal:
            return
        if self._bar is None:
            columns = (
                SpinnerColumn(),
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._bar.add_task("steps", total=steps, completed=step - 1)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, total=steps)


def step_line(metrics: StepMetrics, steps: int, accuracy: float | None) -> str:
    """`step  7/40  loss 0.1234  kept 50.0 %  accuracy 71.9 %  2,310 tokens/s  1.4 s`."""
    width = len(str(steps))
    rate = metrics.tokens_generated / metrics.seconds_step if metrics.seconds_step else 0.0
    parts = [
        f"step {metrics.step:>{width}}/{steps}",
        f"loss {metrics.loss:.4f}",
        f"kept {metrics.kept_fraction:.1%}",
        f"accuracy {percent(accuracy)}",
        f"{rate:,.0f} tokens/s",
        f"{metrics.seconds_step:.1f} s",
    ]
    skipped = ["update skipped: not finite"] if metrics.update_skipped else []
    return "  ".join(parts + skipped)


def evaluation_line(result: EvaluationResult) -> str:
    """`carry after step 10: 71.9 % +- 2.8 % of 256 problems, 25 tokens, 0.0 % truncated`."""
    when = f"after step {result.step}" if result.step else "before the first step"
    several = f", any of {result.samples} {result.pass_any:.1%}" if result.samples > 1 else ""
    return (
        f"{result.name} {when}: {result.mean:.1%} +- {result.standard_error:.1%} of "
        f"{result.problems} problems{several}, {result.response_tokens_mean:.0f} tokens, "
        f"{result.truncated_fraction:.1%} truncated"
    )


def summary(status: RunStatus, directory: str, report: str | None) -> list[str]:
    """The end of a run in lines of rich markup: result, files, and how to go on."""
    further = (f"  {line}" for line in _next_commands(status, escape(shortest(directory))))
    return [*result_lines(status, directory, report), "", "go on with", *further]


def result_lines(status: RunStatus, place: str, report: str | None) -> list[str]:
    """The same without how to go on; `place` is the run's directory, or who answers for it."""
    ended = {RunState.SUCCEEDED: "green", RunState.CANCELLED: "yellow"}.get(status.state, "red")
    lines = ["", f"[bold {ended}]{status.state.value}[/] after step {status.step}/{status.steps}"]
    if status.error:
        lines.append(f"error      {escape(status.error)}")
    if status.accuracy is not None:
        before, after = percent(status.initial_accuracy), percent(status.accuracy)
        lines.append(f"accuracy   {before} before, [bold]{after}[/] after")
    if status.bytes_unpruned:
        share = status.bytes_shipped / status.bytes_unpruned
        lines.append(
            f"to learner {size(status.bytes_shipped)}, {share:.0%} of the "
            f"{size(status.bytes_unpruned)} without selection"
        )
    lines.append(f"run        {escape(shortest(place))}")
    if report:
        lines.append(f"report     {escape(shortest(report))}")
    return lines


def _next_commands(status: RunStatus, run: str) -> list[str]:
    if status.state is RunState.SUCCEEDED:
        return [
            f"tip-ray samples {run}    # rollouts, the kept tokens marked",
            f"tip-ray metrics {run}    # every number of every step",
            "tip-ray init gsm8k my-run.yaml    # a spec of your own",
        ]
    return [
        f"tip-ray status {run}    # where it stopped, and why",
        f"tip-ray run {run}/spec.yaml --run-id {status.run_id}    # go on from its checkpoint",
        f"tip-ray report {run}    # the page, as far as it came",
    ]


def percent(fraction: float | None) -> str:
    """`71.9%`, or `-`."""
    return "-" if fraction is None else f"{fraction:.1%}"


def size(count: float) -> str:
    """Bytes with a binary unit: `1.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 07 s` or `12 s`."""
    whole = max(0, int(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def shortest(path: str) -> str:
    """A local path relative to the working directory if it lies in it; else as it is."""
    here = os.getcwd()
    inside = path.startswith(f"{here}/")
    return os.path.relpath(path, here) if inside else path
