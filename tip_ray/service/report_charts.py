"""The report's curves as Plotly figures in plain data: `{"traces": [...], "layout": {...}}`.

A line of colour "ink" gets the page's text colour, light or dark.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tip_ray.contract.run_state import EvaluationResult
from tip_ray.control.progress import size

MAX_POINTS = 1000  # longer runs are drawn as means over windows of steps
# Colours and words that the web page has too.
_SHARED = json.loads((Path(__file__).parent / "page" / "figures.json").read_text(encoding="utf-8"))
RUN_COLOURS: tuple[str, ...] = tuple(_SHARED["runs"])
_GREY = "#8a94a3"

Figure = dict[str, Any]


@dataclass(frozen=True)
class Curves:
    """One run's numbers, as they are drawn."""

    label: str
    colour: str
    metrics: dict[str, list[float]]  # by column, one value a step or window of steps
    evaluations: Sequence[EvaluationResult]

    @property
    def steps(self) -> list[float]:
        return self.metrics["step"]


def thinned(table: pa.Table) -> dict[str, list[float]]:
    """Columns of the metrics with at most MAX_POINTS values, each the mean of its window."""
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    if table.num_rows > MAX_POINTS:
        starts = np.linspace(0, table.num_rows, MAX_POINTS, endpoint=False).astype(int)
        counts = np.diff([*starts, table.num_rows])
        columns = {k: np.add.reduceat(v, starts) / counts for k, v in columns.items()}
    return {name: [_short(value) for value in values] for name, values in columns.items()}


def shared_figures(runs: Sequence[Curves]) -> dict[str, tuple[str, str, Figure]]:
    """Curves of all runs laid over each other: id -> (title, note, figure)."""
    found = {}
    for curve in _SHARED["curves"]:
        if "columns" in curve:
            figure = _lines(runs, curve["columns"], percent=curve.get("percent", False))
        else:
            figure = _accuracy(runs)
        found[curve["id"]] = (curve["title"], curve["note"], figure)
    return found


def own_figures(run: Curves) -> dict[str, tuple[str, str, Figure]]:
    """What is drawn for each run alone: id -> (title, note, figure)."""
    return {
        "quadrants": ("Quadrants", "Thresholds of each step's own quantiles", _quadrants(run, "")),
        "frozen": ("Quadrants, frozen", "Thresholds of step 1", _quadrants(run, "frozen_")),
        "bytes": (
            "Bytes by hop",
            "Mean of a step; grey: without selection",
            _bytes(run),
        ),
        "stages": (
            "Seconds by stage",
            "Busy seconds; stages of neighbouring steps overlap, the line is wall time",
            _stages(run),
        ),
    }


def _lines(runs: Sequence[Curves], columns: dict[str, str], *, percent: bool = False) -> Figure:
    """One line a run and column: the first column solid, the others dotted."""
    traces = []
    for run in runs:
        for index, (column, what) in enumerate(columns.items()):
            name = what if len(runs) == 1 else run.label if len(columns) == 1 else ""
            line = {"color": run.colour, **({"width": 1.4, "dash": "dot"} if index else {})}
            traces.append(
                {
                    "x": run.steps,
                    "y": run.metrics[column],
                    "name": name or f"{run.label}, {what}",
                    "mode": _mode(run.steps),
                    "line": line,
                }
            )
    several = len(traces) > 1
    return {"traces": traces, "layout": {**_layout(percent=percent), "showlegend": several}}


def _accuracy(runs: Sequence[Curves]) -> Figure:
    traces = []
    for run in runs:
        names = list(dict.fromkeys(result.name for result in run.evaluations))
        for index, name in enumerate(names):
            results = [result for result in run.evaluations if result.name == name]
            traces.append(
                {
                    "x": [result.step for result in results],
                    "y": [_short(result.mean) for result in results],
                    "error_y": {
                        "array": [_short(result.standard_error) for result in results],
                        "thickness": 1,
                        "width": 2,
                    },
                    "name": name if len(runs) == 1 else f"{run.label}, {name}",
                    "mode": "lines+markers",
                    "line": {"color": run.colour, "width": 2, "dash": "dot" if index else "solid"},
                }
            )
    return {"traces": traces, "layout": _layout(percent=True)}


def _quadrants(run: Curves, prefix: str) -> Figure:
    traces = [
        {
            "x": run.steps,
            "y": run.metrics[f"{prefix}{quadrant['key']}_share"],
            "name": quadrant["label"],
            "mode": _mode(run.steps),
            "stackgroup": "one",
            "line": {"width": 0.5, "color": quadrant["colour"]},
            "fillcolor": quadrant["colour"],
        }
        for quadrant in _SHARED["quadrants"]
    ]
    layout = _layout(percent=True)
    layout["yaxis"]["range"] = [0, 1]
    return {"traces": traces, "layout": layout}


def _bytes(run: Curves) -> Figure:
    hops = _SHARED["hops"]
    means = [_mean(run.metrics[hop["column"]]) for hop in hops]
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [hop["label"] for hop in hops],
        "x": means,
        "marker": {"color": [_GREY if hop.get("unpruned") else run.colour for hop in hops]},
        "text": [size(mean) for mean in means],
        "hovertemplate": "%{y}: %{text}<extra></extra>",
        "cliponaxis": False,
    }
    layout = {
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": {"showticklabels": False, "rangemode": "tozero", "nticks": 6},
        "yaxis": {"autorange": "reversed"},
    }
    return {"traces": [trace], "layout": layout}


def _stages(run: Curves) -> Figure:
    traces: list[Figure] = [
        {
            "type": "bar",
            "x": run.steps,
            "y": run.metrics[f"seconds_{stage['key']}"],
            "name": stage["key"],
            "marker": {"color": stage["colour"], "line": {"width": 0}},
        }
        for stage in _SHARED["stages"]
    ]
    wall = {"x": run.steps, "y": run.metrics["seconds_step"], "name": "wall time of the step"}
    traces.append({**wall, "mode": _mode(run.steps), "line": {"color": "ink", "width": 2}})
    return {"traces": traces, "layout": {**_layout(), "barmode": "stack", "bargap": 0.1}}


def _layout(*, percent: bool = False) -> Figure:
    yaxis: Figure = {"rangemode": "tozero"}
    if percent:
        yaxis["tickformat"] = ".0%"
    return {"xaxis": {"title": {"text": "step", "standoff": 4}}, "yaxis": yaxis}


def _mode(steps: Sequence[float]) -> str:
    return "lines" if len(steps) > 1 else "markers"


def _mean(values: Sequence[float]) -> float:
    return _short(sum(values) / len(values)) if values else 0.0


def _short(value: Any) -> Any:
    """Five digits are enough for a curve; a gap where the number is not finite."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(f"{value:.5g}") if np.isfinite(value) else None
