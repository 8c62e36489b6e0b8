"""The reading side of run directories: for the command line, the service and reports."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
import yaml
from pydantic import ValidationError

from tip_ray.contract.errors import NotFoundError, RunDirectoryError
from tip_ray.contract.run_state import EvaluationResult, RunStatus
from tip_ray.control.metrics_parts import AUDIT_SCHEMA, from_parquet, merge_parts, metrics_part
from tip_ray.control.run_directory import (
    AUDIT,
    CANCEL,
    EVENTS,
    LOG,
    METRICS,
    QUARANTINE,
    RUN_ROOT_VARIABLE,
    SAMPLES_DIRECTORY,
    SAMPLES_WITH_TEXT,
    SPEC,
    STATUS,
    is_run_id,
    samples_name,
)
from tip_ray.control.storage import Storage

DEFAULT_RUN_ROOT = "runs"
_LISTINGS = 3


def default_run_roots() -> list[str]:
    """Where runs are looked for when no root is given: TIP_RAY_RUN_ROOT and the spec's default
    root under it; without the variable, that default alone."""
    base = os.environ.get(RUN_ROOT_VARIABLE, "")
    return [base, f"{base.rstrip('/')}/{DEFAULT_RUN_ROOT}"] if base else [DEFAULT_RUN_ROOT]


class RunReader:
    """One run's files. Every method reads anew.

    All raise NotFoundError where the file is absent, RunDirectoryError where it is broken.
    """

    def __init__(self, url: str) -> None:
        self.storage = Storage(url)

    @property
    def url(self) -> str:
        """An absolute path or a URL."""
        return self.storage.url

    @property
    def run_id(self) -> str:
        return self.url.rpartition("/")[2]

    def exists(self) -> bool:
        return self.storage.exists(SPEC) or self.storage.exists(STATUS)

    def read_status(self) -> RunStatus:
        try:
            content = self.storage.read(STATUS)
        except NotFoundError:
            raise NotFoundError(f"{self.url}: no such run, or it has not begun") from None
        return parse_status(content, f"{self.url}/{STATUS}")

    def read_spec(self) -> dict[str, Any]:
        """The spec as plain data: secrets are blanked, and a newer release's fields stay."""
        try:
            data = yaml.safe_load(self.storage.read(SPEC))
        except (yaml.YAMLError, ValueError, RecursionError):  # a date of the 13th month, say
            data = None
        if not isinstance(data, dict):
            raise RunDirectoryError(f"{self.url}/{SPEC}: not a spec")
        return data

    def read_metrics(self) -> pa.Table:
        """One row a step, in order of step; without rows before the first step has ended."""
        for _ in range(_LISTINGS):
            parts = self.read_metrics_parts(self._metrics_names())
            gone = [name for name, part in parts.items() if part is None]
            if not gone:
                return merge_parts(part for part in parts.values() if part is not None)
            # else the writer has just merged some: list again
        raise RunDirectoryError(f"{self.url}/{gone[0]}: gone as soon as it is listed; try again")

    def read_metrics_parts(self, names: Sequence[str]) -> dict[str, pa.Table | None]:
        """The parts of these names, in this order; None for one that is not there any more."""
        found = self.storage.read_all(names)
        return {
            name: metrics_part(found[name], f"{self.url}/{name}") if name in found else None
            for name in names
        }

    def _metrics_names(self) -> list[str]:
        """Merged parts before single ones: where both have a step, the single one is newer."""
        names = [name for name in self.storage.names(METRICS) if name.endswith(".parquet")]
        names = [f"{METRICS}/{name}" for name in names]
        return sorted(names, key=lambda name: (name.startswith(f"{METRICS}/step-"), name))

    def read_audit(self) -> pa.Table:
        """What became of every rollout, all steps: AUDIT_SCHEMA, in order of step."""
        names = [f"{AUDIT}/{n}" for n in self.storage.names(AUDIT) if n.endswith(".parquet")]
        parts = self.storage.read_all(names)
        tables = [from_parquet(part, f"{self.url}/{name}") for name, part in parts.items()]
        return pa.concat_tables([AUDIT_SCHEMA.empty_table(), *tables])

    def read_events(self) -> list[dict[str, Any]]:
        """All events by time: `time`, `kind`, `step` and the kind's own fields."""
        names = [f"{EVENTS}/{n}" for n in self.storage.names(EVENTS) if n.endswith(".json")]
        contents = self.storage.read_all(names)
        return [
            parse_object(contents[name], f"{self.url}/{name}") for name in names if name in contents
        ]

    def read_evaluations(self) -> list[EvaluationResult]:
        """In order of step; a replayed step's evaluation replaces the first one's."""
        return newest_evaluations(self.read_events(), f"{self.url}/{EVENTS}")

    def sample_steps(self) -> list[int]:
        """Steps that have samples, ascending."""
        stems = [name.removesuffix(".arrow") for name in self.storage.names(SAMPLES_DIRECTORY)]
        numbers = [stem.removeprefix("step-") for stem in stems]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def read_samples(self, step: int | None = None) -> pa.Table:
        """The rollouts of `step`, or of the newest step that has some: SAMPLES_WITH_TEXT."""
        if step is None:
            steps = self.sample_steps()
            if not steps:
                raise NotFoundError(f"{self.url}: no samples yet")
            step = steps[-1]
        name = f"{SAMPLES_DIRECTORY}/{samples_name(step)}"
        try:
            content = self.storage.read(name)
        except NotFoundError:
            raise NotFoundError(f"{self.url}: no samples of step {step}") from None
        try:
            return _samples(pa.ipc.open_file(pa.BufferReader(content)).read_all())
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise RunDirectoryError(
                f"{self.url}/{name}: not a whole Arrow file of samples ({reason}); delete it"
            ) from None

    def read_quarantine(self) -> list[dict[str, Any]]:
        """Quarantined rollouts with stage and reason; a last line that is half written is left."""
        if not self.storage.exists(QUARANTINE):
            return []
        lines = self.storage.read(QUARANTINE).split(b"\n")[:-1]
        return [parse_object(line, f"{self.url}/{QUARANTINE}") for line in lines]

    def read_log(self) -> str:
        return self.storage.read(LOG).decode(errors="replace")

    def cancel_requested(self) -> bool:
        return self.storage.exists(CANCEL)


def list_runs(run_root: str, on_broken: Callable[[str], None] = lambda _: None) -> list[RunStatus]:
    """Status of every run under `run_root`, newest first; `on_broken` hears of unreadable ones."""
    storage = Storage(run_root)
    names = [f"{name}/{STATUS}" for name in storage.names() if is_run_id(name)]
    statuses = []
    for name, content in storage.read_all(names).items():
        try:
            statuses.append(parse_status(content, f"{storage.url}/{name}"))
        except RunDirectoryError as error:
            on_broken(str(error))
    return sorted(statuses, key=lambda status: status.started_at, reverse=True)


def newest_evaluations(events: Iterable[dict[str, Any]], name: str) -> list[EvaluationResult]:
    """Of all events, in order of step; `name` is what they were read from, for errors.

    Raises:
        RunDirectoryError: an evaluation lacks a field.
    """
    found = [event for event in events if event.get("kind") == "evaluation"]
    try:
        results = [EvaluationResult.model_validate(event) for event in found]
    except ValidationError as error:
        raise RunDirectoryError(f"{name}: {_first(error)}") from None
    newest = {(result.name, result.step): result for result in results}
    return sorted(newest.values(), key=lambda result: result.step)


def resolve_run(run: str, run_root: str | None = None) -> RunReader:
    """The run that `run` names: a run id under `run_root`, or a run directory's path or URL.

    Raises:
        NotFoundError: there is none.
    """
    roots = default_run_roots() if run_root is None else [run_root]
    places = [f"{root.rstrip('/')}/{run}" for root in roots] if is_run_id(run) else []
    if not is_run_id(run) and ("/" in run or run in (".", "..")):
        places = [run]
    for place in places:
        reader = RunReader(place)
        if reader.exists():
            return reader
    where = "" if places == [run] else f" under {' or '.join(roots)}"
    cure = "see `tip-ray list`, or give --run-root"
    raise NotFoundError(f"no run {run!r}{where}; {cure}")


def _samples(table: pa.Table) -> pa.Table:
    """The columns of SAMPLES_WITH_TEXT that are there; another release may have others."""
    table.validate(full=True)
    known = [field for field in SAMPLES_WITH_TEXT if field.name in table.column_names]
    for field in known:
        found = table.column(field.name).type
        if found != field.type:
            raise pa.ArrowInvalid(f"{field.name}: found {found}, expected {field.type}")
    return table.select([field.name for field in known])


def parse_status(content: bytes, name: str) -> RunStatus:
    """Raises RunDirectoryError where `content` is not a status; `name` is where it was read."""
    try:
        return RunStatus.model_validate_json(content)
    except ValidationError as error:
        raise RunDirectoryError(f"{name}: not a run's status ({_first(error)})") from None


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """A JSON object; raises RunDirectoryError where `content` is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{name}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{name}: not a JSON object")
    return value


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else str(problem["msg"])
