"""Which rule keeps the tokens that teach? The selection study, on the pair of the quickstart.

    python -m tests.benchmarks.bench_selection --output outputs/bench           # a small part
    python -m tests.benchmarks.bench_selection --output outputs/bench --full    # all of it

Real runs, strictly on-policy, with everything but the rule equal: greedy accuracy on held-out
problems over the steps, at equal steps and at equal learner tokens, over seeds; then what each
rule does to the gradient at fixed weights (selection_gradients.py). Runs that are made stay as
parts under DIR/selection, and `--minutes` stops in between: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of this process; before ray
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from tests.benchmarks.common import print_table, write_json
from tests.benchmarks.selection_batches import divergence_kept
from tests.benchmarks.selection_gradients import gradient_study
from tests.benchmarks.selection_runs import Arm, Settings, make_parts, read_part
from tests.benchmarks.svg_curves import Line, Panel, draw
from tip_ray.contract.spec import BUILTIN_RULES
from tip_ray.runtime.cluster import connected
from tip_ray.service.report_charts import RUN_COLOURS

COLOURS = dict(zip(BUILTIN_RULES, ("#1b2430", *RUN_COLOURS, "#7a5c3e"), strict=True))
CONTROLS = ("all", "random", "prefix", "soft_or_bottom")  # dashed in the plot
SHOWN_STEPS = (10, 14, 18)  # beside the last
UPDATES = 12  # after them about half of the carries are right
SCALE = {False: {"batches": 16, "draws": 32}, True: {"batches": 64, "draws": 256}}  # by --full
CPUS = 8  # logical ones of the cluster: a crew needs 3
Parts = Mapping[Arm, Sequence[dict[str, Any]]]  # an arm's runs, a seed each
Spread = tuple[float, float | None]  # mean, and its standard error over seeds


def main() -> int:
    options = _options()
    settings, arms, seeds = _study(options.full, options.lr)
    folder = options.output / "selection"
    folder.mkdir(parents=True, exist_ok=True)
    _train(settings, arms, seeds, folder, options.minutes * 60)
    found = {arm: [read_part(folder, settings, arm, seed) for seed in seeds] for arm in arms}
    missing = sum(part is None for own in found.values() for part in own)
    if missing:
        print(f"selection: {missing} runs are still to be made; the same command goes on")  # noqa: T201
        return 0
    parts: Parts = {arm: [part for part in own if part] for arm, own in found.items()}
    gradients = _gradients(settings, arms, folder, SCALE[options.full])
    rows = [row for retention in _retentions(arms) for row in _rows(parts, retention)]
    shares = divergence_kept(settings, arms)
    _print(rows, shares, gradients)
    (options.output / "selection.svg").write_text(_plot(parts), encoding="utf-8")
    figures = {
        "accuracy": rows,
        "runs": [run for runs in parts.values() for run in runs],
        "divergence_kept": shares,
        "gradients": gradients,
    }
    write_json(options.output, "selection", figures, settings=asdict(settings), seeds=len(seeds))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="every rule, both retentions, 3 seeds")
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--minutes", type=float, default=90.0, help="start no run after these")
    return parser.parse_args()


def _study(full: bool, lr: float) -> tuple[Settings, list[Arm], range]:
    """Everything; or three rules and `all` at one retention, once."""
    rules = [rule for rule in BUILTIN_RULES if rule != "all"]
    if not full:
        rules = ["random", "soft_or", "soft_or_bottom"]
    retentions = (0.5, 0.1) if full else (0.1,)
    arms = [Arm("all", 1.0), *(Arm(rule, kept) for kept in retentions for rule in rules)]
    settings = Settings(lr=lr, steps=30 if full else 20)
    return settings, arms, range(3 if full else 1)


def _train(
    settings: Settings, arms: Sequence[Arm], seeds: range, folder: Path, limit_s: float
) -> None:
    if all(read_part(folder, settings, arm, seed) for arm in arms for seed in seeds):
        return
    with (
        tempfile.TemporaryDirectory(prefix="tip-ray-") as short,
        connected(None, num_cpus=CPUS, namespace="selection"),
    ):
        for line in make_parts(settings, arms, seeds, folder, Path(short), limit_s):
            print(line, flush=True)  # noqa: T201


def _gradients(
    settings: Settings, arms: Sequence[Arm], folder: Path, scale: dict[str, int]
) -> dict[str, Any]:
    """The gradient study, as another part."""
    path, made_with = folder / "gradients.json", {"settings": asdict(settings), **scale}
    if path.exists():
        part: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if part["made_with"] == made_with:
            return part
    torch.set_num_threads(1)
    found = gradient_study(settings, arms, updates=UPDATES, **scale)
    path.write_text(json.dumps({"made_with": made_with, **found}) + "\n", encoding="utf-8")
    return found


# The table


def _retentions(arms: Sequence[Arm]) -> list[float]:
    return sorted({arm.retention for arm in arms if arm.rule != "all"}, reverse=True)


def _rows(parts: Parts, retention: float) -> list[dict[str, Any]]:
    """A row a rule at `retention`, `all` first; accuracies in percent, with standard errors."""
    own = {arm: runs for arm, runs in parts.items() if arm.retention in (retention, 1.0)}
    kept = min(run["kept_tokens"][-1] for runs in own.values() for run in runs)
    trunk = min(run["trunk_tokens"][-1] for runs in own.values() for run in runs)
    control = [_area(run) for run in parts[Arm("random", retention)]]
    rows = []
    for arm, runs in own.items():
        areas = [_area(run) for run in runs]
        row: dict[str, Any] = {"retention": retention, "rule": arm.rule}
        for step in (*SHOWN_STEPS, runs[0]["step"][-1]):
            row[f"step {step}"] = _spread([_at(run, "step", step) for run in runs])
        row["mean over steps"] = _spread(areas)
        row["against random"] = _spread([a - b for a, b in zip(areas, control, strict=True)])
        row[f"at {kept:,} kept tokens"] = _spread([_at(run, "kept_tokens", kept) for run in runs])
        row[f"at {trunk:,} trunk tokens"] = _spread(
            [_at(run, "trunk_tokens", trunk) for run in runs]
        )
        rows.append(row)
    return rows


def _area(run: Mapping[str, Any]) -> float:
    """Mean accuracy over the steps, the initial student included."""
    steps, accuracy = run["step"], run["accuracy"]
    return float(np.trapezoid(accuracy, steps) / (steps[-1] - steps[0]))


def _at(run: Mapping[str, Any], axis: str, value: float) -> float:
    """Accuracy at `value` of an axis, by straight lines between evaluations."""
    return float(np.interp(value, run[axis], run["accuracy"]))


def _spread(values: Sequence[float]) -> Spread:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return mean(values), error


def _print(
    rows: Sequence[Mapping[str, Any]],
    shares: Sequence[Mapping[str, Any]],
    gradients: Mapping[str, Any],
) -> None:
    print("\nGreedy accuracy in percent, with its standard error over seeds")  # noqa: T201
    for retention in dict.fromkeys(row["retention"] for row in rows):
        print()  # noqa: T201
        print_table(
            [
                {name: _percent(value) for name, value in row.items()}
                for row in rows
                if row["retention"] == retention
            ]
        )
    print("\nReverse KL of the initial student on the tokens kept, a share\n")  # noqa: T201
    print_table(shares)
    for state, title in (("start", "the initial student"), ("later", "the student later")):
        for table, over in (("over_batches", "batches"), ("over_draws", "draws")):
            print(f"\nGradients of {title}, over {gradients[over]} {over}\n")  # noqa: T201
            print_table(gradients[state][table])


def _percent(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    middle, error = value
    return f"{100 * middle:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


# The plot


def _plot(parts: Parts) -> str:
    """Accuracy over steps and over kept tokens, a column a retention."""
    retentions = _retentions(list(parts))
    steps = max(runs[0]["step"][-1] for runs in parts.values())
    top = max(run["kept_tokens"][-1] for runs in parts.values() for run in runs)
    least = min(run["kept_tokens"][1] for runs in parts.values() for run in runs)
    rows = [("step", "step", (0.0, float(steps))), ("kept_tokens", "kept tokens", (least, top))]
    panels = [
        [
            Panel(
                title=f"retention {retention:g}",
                x_label=label,
                lines=[
                    _line(arm, runs, axis)
                    for arm, runs in parts.items()
                    if arm.retention in (retention, 1.0)
                ],
                x_range=span,
                y_range=_y_range(parts),
                log_x=axis == "kept_tokens",
            )
            for retention in retentions
        ]
        for axis, label, span in rows
    ]
    return draw(panels)


def _line(arm: Arm, runs: Sequence[Mapping[str, Any]], axis: str) -> Line:
    accuracy = np.array([run["accuracy"] for run in runs])
    error = accuracy.std(0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else 0 * accuracy[0]
    first = axis != "step"  # no kept token has a place on a logarithmic axis
    return Line(
        arm.rule,
        COLOURS[arm.rule],
        np.mean([run[axis] for run in runs], 0).tolist()[first:],
        accuracy.mean(0).tolist()[first:],
        error.tolist()[first:],
        "5 3" if arm.rule in CONTROLS else "",
    )


def _y_range(parts: Parts) -> tuple[float, float]:
    low = min(min(run["accuracy"]) for runs in parts.values() for run in runs)
    return np.floor(10 * low) / 10, 1.0


if __name__ == "__main__":
    sys.exit(main())
