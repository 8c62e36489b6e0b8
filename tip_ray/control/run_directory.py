"""The run's files, written by one process: the driver.

    <run_root>/<run_id>/
      spec.yaml                  as resolved, secrets blanked
      status.json                RunStatus, replaced atomically
      metrics/step-*.parquet     one row a step; full hundreds are merged into steps-*.parquet
      audit/step-*.parquet       one row a rollout of the step: what became of it
      events/*.json              state changes, faults, recoveries, evaluations
      samples/step-*.arrow       a few rollouts a step: SAMPLES_WITH_TEXT
      logs/driver.log
      quarantine.jsonl
      cancel                     a request, made by anyone

`run_reader` is the reading side.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from tip_ray.contract.errors import (
    LeaseLostError,
    NotFoundError,
    RunDirectoryError,
    SpecError,
)
from tip_ray.contract.headers import Quarantined
from tip_ray.contract.run_state import EvaluationResult, RunStatus, StepMetrics
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.tables import SAMPLES, STRING, TOP_SHOWN, conform, list_of, rows_of
from tip_ray.control.metrics_parts import METRICS_SCHEMA, from_parquet, merge_parts, to_parquet
from tip_ray.control.spec_file import dump_spec
from tip_ray.control.storage import Storage

RUN_ID_LENGTH = 40
RUN_ROOT_VARIABLE = "TIP_RAY_RUN_ROOT"
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set for the entrypoint of a Ray job

SPEC, STATUS, CANCEL, QUARANTINE = "spec.yaml", "status.json", "cancel", "quarantine.jsonl"
METRICS, EVENTS, SAMPLES_DIRECTORY, LOG = "metrics", "events", "samples", "logs/driver.log"
AUDIT = "audit"
REPORT = "report.html"
MERGE_STEPS = 100  # so many metrics parts are merged into one

SAMPLES_WITH_TEXT = pa.schema(
    [
        *SAMPLES,
        pa.field("text", list_of(STRING), nullable=False),  # [m]; a string a response token
        pa.field("prompt_text", STRING, nullable=False),
        # [m, 5]; of the ids in *_top_ids, "" where there is none
        pa.field("student_top_text", rows_of(STRING, TOP_SHOWN), nullable=False),
        pa.field("teacher_top_text", rows_of(STRING, TOP_SHOWN), nullable=False),
    ]
)

_RUN_ID = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_EVENT_KIND = re.compile(r"[a-z][a-z0-9_]*")
_LOG_FLUSH_BYTES = 64 * 1024
_LOG_FLUSH_S = 2.0


def is_run_id(text: str) -> bool:
    """Whether `text` is DNS-1035 and at most 40 characters."""
    return len(text) <= RUN_ID_LENGTH and _RUN_ID.fullmatch(text) is not None


def check_run_id(run_id: str) -> str:
    """`run_id` itself.

    Raises:
        SpecError: it is not DNS-1035 or longer than 40 characters.
    """
    if not is_run_id(run_id):
        expected = "a lower-case letter, then letters, digits or '-', at most 40, no '-' at the end"
        raise SpecError("--run-id", repr(run_id), expected, "e.g. my-run-1")
    return run_id


def new_run_id(name: str) -> str:
    """`<name>-<yymmdd-hhmmss>-<4 hex>`, the name cut so that it is at most 40 characters."""
    tail = f"-{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return check_run_id(name[: RUN_ID_LENGTH - len(tail)].rstrip("-") + tail)


def resolve_run_root(run_root: str, environment: Mapping[str, str] | None = None) -> str:
    """`run_root` as an absolute path or URL: a relative one lies under TIP_RAY_RUN_ROOT, if set.

    Raises:
        SpecError: it is relative inside a Ray job, whose working directory no client finds and
            Ray may delete, and TIP_RAY_RUN_ROOT does not say where it lies.
    """
    environment = os.environ if environment is None else environment
    if _absolute(run_root):
        return run_root
    base = environment.get(RUN_ROOT_VARIABLE, "")
    if _absolute(base):
        return f"{base.rstrip('/')}/{run_root.removeprefix('./')}"
    if RAY_JOB_VARIABLE in environment:
        cure = f"give --run-root, or set {RUN_ROOT_VARIABLE}"
        expected = "an absolute path or a URL inside a Ray job, which deletes its working directory"
        raise SpecError("run_root", repr(run_root), expected, cure)
    return os.path.abspath(os.path.join(base, run_root))


def _absolute(place: str) -> bool:
    return "://" in place or place.startswith(("/", "~"))


class RunDirectory:
    """The writing side of one run's directory; safe to call from several threads."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self.storage, self.run_id = storage, run_id
        self._lock = threading.RLock()
        self._lease = (0, "")  # epoch and driver: none, as for who only asks the run to stop
        self._events = 0
        self._log: list[bytes] = []
        self._log_bytes = 0
        self._log_flushed_at = time.monotonic()

    @classmethod
    def create(cls, run_root: str, run_id: str, spec: RunSpec) -> RunDirectory:
        """A new directory with the spec in it.

        Raises:
            SpecError: the run id is not one, or `run_root` is relative inside a Ray job.
            RunDirectoryError: the run exists, or the root cannot be written.
        """
        directory = cls._at(run_root, run_id)
        try:
            exists = directory.storage.exists(SPEC)
            if not exists:
                directory.write_spec(spec)
        except RunDirectoryError as error:
            raise RunDirectoryError(f"run_root: {error}; choose another --run-root") from error
        if exists:
            raise RunDirectoryError(f"{directory.url}: the run exists; choose another --run-id")
        return directory

    @classmethod
    def open(cls, run_root: str, run_id: str) -> RunDirectory:
        """The directory of a run that was created before, to go on writing.

        Raises:
            NotFoundError: there is no such run.
            SpecError, RunDirectoryError: as `create`.
        """
        directory = cls._at(run_root, run_id)
        if not directory.storage.exists(SPEC):
            raise NotFoundError(f"{directory.url}: no such run")
        return directory

    @classmethod
    def _at(cls, run_root: str, run_id: str) -> RunDirectory:
        root = resolve_run_root(run_root)
        return cls(Storage(f"{root.rstrip('/')}/{check_run_id(run_id)}"), run_id)

    @property
    def url(self) -> str:
        """An absolute path or a URL."""
        return self.storage.url

    def write_spec(self, spec: RunSpec) -> None:
        """The spec as resolved: its run_root absolute, secrets blanked."""
        resolved = spec.model_copy(update={"run_root": self.url.rpartition("/")[0] or "/"})
        self.storage.write(SPEC, dump_spec(resolved, redact=True).encode())

    def write_status(self, status: RunStatus) -> None:
        """Replace status.json, and flush the log beside it.

        From the first call on, every change of the directory needs the lease that `status` names.

        Raises:
            LeaseLostError: a driver of a later epoch has taken the run over.
        """
        with self._lock:
            self._lease = (status.epoch, status.driver)
            self.storage.before_change = self.check_lease
            self.storage.write(STATUS, status.model_dump_json(indent=1).encode())
            self.flush_log()

    def check_lease(self) -> None:
        """Raises LeaseLostError if another driver has taken the run over.

        Between this look and the write that follows it a driver can still be stopped; a takeover
        in such a moment is seen at the write after.
        """
        epoch, driver = self._lease_on_disk()
        mine, me = self._lease
        if epoch > mine or (epoch == mine and driver != me):
            raise LeaseLostError(
                f"{self.url}: taken over by another driver (epoch {epoch}, this one is of "
                f"{mine}); let that one go on"
            )

    def append_metrics(self, metrics: StepMetrics) -> None:
        """One row; it replaces what an earlier try of the same step wrote."""
        with self._lock:
            row = pa.Table.from_pylist([metrics.model_dump()], schema=METRICS_SCHEMA)
            self.storage.write(f"{METRICS}/{_metrics_name(metrics.step)}", to_parquet(row))
            if metrics.step % MERGE_STEPS == 0:
                self._merge_metrics(metrics.step)

    def forget_after(self, step: int) -> None:
        """Drop metrics, samples and audit of later steps: they are about to be made again."""
        with self._lock:
            for name in self.storage.names(METRICS):
                if name.startswith("steps-"):
                    self._shorten(f"{METRICS}/{name}", step)
            for directory in (METRICS, SAMPLES_DIRECTORY, AUDIT):
                for name in self.storage.names(directory):
                    number = name.removeprefix("step-").partition(".")[0]
                    if number.isdecimal() and int(number) > step:
                        self.storage.delete(f"{directory}/{name}")

    def write_event(self, kind: str, step: int, **fields: Any) -> None:
        """One small file; its name sorts by time. `fields` are JSON or pydantic models."""
        if not _EVENT_KIND.fullmatch(kind):
            raise ValueError(f"event kind {kind!r}: lower-case letters, digits and _ expected")
        now = time.time()
        event = {"time": now, "kind": kind, "step": step, **_jsonable(fields)}
        with self._lock:
            self._events += 1
            name = f"{int(now * 1000):013d}-{self._events:06d}-{kind}.json"
            self.storage.write(f"{EVENTS}/{name}", json.dumps(event, allow_nan=False).encode())

    def write_evaluation(self, result: EvaluationResult) -> None:
        """The event `evaluation`, whose fields are those of `result`."""
        self.write_event("evaluation", result.step, **result.model_dump(exclude={"step"}))

    def write_samples(self, step: int, table: pa.Table) -> None:
        """samples/step-<step>.arrow; raises TableError unless it is SAMPLES_WITH_TEXT."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SAMPLES_WITH_TEXT) as writer:
            writer.write_table(conform(table, SAMPLES_WITH_TEXT))
        content = sink.getvalue().to_pybytes()
        self.storage.write(f"{SAMPLES_DIRECTORY}/{samples_name(step)}", content)

    def write_audit(self, step: int, table: pa.Table) -> None:
        """audit/step-<step>.parquet; it replaces what an earlier try of the step wrote."""
        self.storage.write(f"{AUDIT}/{_metrics_name(step)}", to_parquet(table))

    def quarantine(self, items: Iterable[Quarantined]) -> None:
        """One line an item: the rollout, the stage it failed in, and why."""
        lines = "".join(json.dumps({"time": time.time(), **asdict(item)}) + "\n" for item in items)
        if lines:
            with self._lock:
                self.storage.append(QUARANTINE, lines.encode())

    def append_log(self, line: str) -> None:
        """A line for logs/driver.log; written within seconds, or by the next status."""
        with self._lock:
            content = f"{line}\n".encode()
            self._log.append(content)
            self._log_bytes += len(content)
            late = time.monotonic() - self._log_flushed_at > _LOG_FLUSH_S
            if late or self._log_bytes > _LOG_FLUSH_BYTES:
                self.flush_log()

    def log_handler(self) -> logging.Handler:
        """For the logger `tip_ray` (not the root: file systems log while the log is written)."""
        return _LogHandler(self)

    def flush_log(self) -> None:
        """Write the lines that wait."""
        with self._lock:
            content, self._log, self._log_bytes = b"".join(self._log), [], 0
            self._log_flushed_at = time.monotonic()
            try:
                if content:
                    self.storage.append(LOG, content)
            except RunDirectoryError:
                self._log = [content]  # for the next try
                raise

    def cancel_requested(self) -> bool:
        """Whether someone asked the run to stop."""
        return self.storage.exists(CANCEL)

    def request_cancel(self) -> None:
        """Ask the driver to finish its step, save a checkpoint and stop."""
        self.storage.write(CANCEL, json.dumps({"requested_at": time.time()}).encode())

    def clear_cancel(self) -> None:
        """Forget the request: the run was told to go on."""
        self.storage.delete(CANCEL)

    def _shorten(self, name: str, step: int) -> None:
        """Keep only the rows up to `step` of a merged metrics part."""
        table = from_parquet(self.storage.read(name), name)
        kept = table.filter(pc.less_equal(table.column("step"), step))
        if kept.num_rows == 0:
            self.storage.delete(name)
        elif kept.num_rows < table.num_rows:
            self.storage.write(name, to_parquet(kept))

    def _lease_on_disk(self) -> tuple[int, str]:
        """(epoch, driver) of status.json."""
        try:
            status = json.loads(self.storage.read(STATUS))
            return int(status["epoch"]), str(status["driver"])
        except (NotFoundError, ValueError, KeyError, TypeError):
            return 0, ""  # none yet, or unreadable: this write mends it

    def _merge_metrics(self, last: int) -> None:
        """One part of the hundred steps up to `last` instead of a hundred; then drop those."""
        first = last - MERGE_STEPS + 1
        merged = f"steps-{first:08d}-{last:08d}.parquet"
        singles = [_metrics_name(step) for step in range(first, last + 1)]
        there = [name for name in (merged, *singles) if name in self.storage.names(METRICS)]
        parts = self.storage.read_all([f"{METRICS}/{name}" for name in there])
        table = merge_parts([from_parquet(content, name) for name, content in parts.items()])
        self.storage.write(f"{METRICS}/{merged}", to_parquet(table))
        for name in there:
            if name != merged:
                self.storage.delete(f"{METRICS}/{name}")


class _LogHandler(logging.Handler):
    """Never raises: a log that cannot be written is no reason to end whatever was logged."""

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__()
        self.directory = directory
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(RunDirectoryError):
            self.directory.append_log(self.format(record))

    def flush(self) -> None:
        with suppress(RunDirectoryError):
            self.directory.flush_log()


def _metrics_name(step: int) -> str:
    return f"step-{step:08d}.parquet"


def samples_name(step: int) -> str:
    return f"step-{step:08d}.arrow"


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names."""
    if isinstance(value, BaseModel):
        return _jsonable(value.model_dump())
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
