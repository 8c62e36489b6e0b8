"""Commands about a run's student alone: eval and export."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from tip_ray.commands.begin import load_spec_of
from tip_ray.commands.output import warn, write, write_table
from tip_ray.commands.reach import reach_directory
from tip_ray.contract.errors import SpecError
from tip_ray.contract.run_state import EvaluationResult
from tip_ray.contract.spec import RunSpec
from tip_ray.control.progress import percent, shortest
from tip_ray.control.run_reader import RunReader

EXPORT = "export"


def evaluate(options: argparse.Namespace) -> int:
    """All evaluations of a spec with one model: a checkpoint, or a run's student."""
    if options.step is not None and options.run is None:
        raise SpecError("--step", str(options.step), "--run RUN beside it")
    spec = load_spec_of(options)
    with _model(options) as (model, step):
        results = _evaluate(spec, model, step)
    if options.json:
        write(json.dumps([one.model_dump(mode="json") for one in results], indent=1))
    else:
        header = ("EVALUATION", "MEAN", "+-", "PROBLEMS", "ANY OF n", "n", "TOKENS", "TRUNCATED")
        write_table(header, [_row(one) for one in results], "; --json has all")
    return 0


def export(options: argparse.Namespace) -> int:
    """A checkpoint as a Hugging Face directory, which must be new."""
    reader = reach_directory(options)
    _refuse_used(options.output)
    step = _export(reader, options.step, options.output)
    write(f"{reader.run_id} after step {step}: {shortest(options.output)}")
    return 0


def _evaluate(spec: RunSpec, model: str, step: int) -> list[EvaluationResult]:
    from tip_ray.control.evaluate_alone import evaluate_alone

    student = spec.student.model_copy(update={"model": model, "revision": None})
    return evaluate_alone(spec.model_copy(update={"student": student}), step)


@contextmanager
def _model(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """What to evaluate, and the step after which it is what it is."""
    if options.model is not None:
        yield options.model, 0
        return
    reader = reach_directory(options)
    whole = f"{EXPORT}/config.json"
    if options.step is None and reader.storage.exists(whole):
        yield f"{reader.url}/{EXPORT}", reader.read_status().step
        return
    with tempfile.TemporaryDirectory(prefix="tip-ray-eval-") as folder:
        path = str(Path(folder) / EXPORT)
        yield path, _export(reader, options.step, path)


def _export(reader: RunReader, step: int | None, output: str) -> int:
    from tip_ray.control.export import export_checkpoint

    return export_checkpoint(reader, step, output, warn)


def _refuse_used(output: str) -> None:
    """An export replaces what was there: that may be a home directory."""
    fs, path = fsspec.core.url_to_fs(output)
    if fs.exists(path) and (not fs.isdir(path) or fs.ls(path, detail=False)):
        raise SpecError("--output", f"{output}, which holds something", "a new directory")


def _row(one: EvaluationResult) -> tuple[str, ...]:
    return (
        one.name,
        percent(one.mean),
        percent(one.standard_error),
        str(one.problems),
        percent(one.pass_any),
        str(one.samples),
        f"{one.response_tokens_mean:.0f}",
        percent(one.truncated_fraction),
    )
