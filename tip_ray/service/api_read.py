"""What the status API reads: the runs under one root, each file once as long as it is the same.

Everything here may block. Broken files raise RunDirectoryError, absent ones NotFoundError, both
naming the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tip_ray.contract.errors import NotFoundError, RunDirectoryError
from tip_ray.contract.run_state import RunStatus
from tip_ray.control.run_directory import (
    EVENTS,
    METRICS,
    SAMPLES_DIRECTORY,
    SPEC,
    STATUS,
    RunDirectory,
    is_run_id,
    samples_name,
)
from tip_ray.control.run_reader import RunReader, parse_object, parse_status
from tip_ray.control.storage import Storage, storage_errors
from tip_ray.service.api_cache import Cache
from tip_ray.service.api_stamps import check_size, file_stamp, part_stamps, time_stamp

EVENTS_READ = 10_000  # of a run, the newest
_CACHE_BYTES = 256 << 20
_SMALL_FILE_BYTES = 1 << 20  # status.json, spec.yaml
_TABLE_BYTES = 64 << 20
_SPEC_VALUES = 100_000
_BATCH = 16  # parts read at once: those before a broken one are kept


@dataclass(frozen=True)
class Listing:
    """All runs, newest first, and a line for each that cannot be read."""

    runs: list[RunStatus]
    broken: list[str]


class Runs:
    """Every run under `run_root`, any fsspec URL; safe to call from several threads."""

    def __init__(self, run_root: str) -> None:
        self.run_root = run_root
        self.storage = Storage(run_root)
        self._cache = Cache(_CACHE_BYTES)

    def listing(self) -> Listing:
        if self.storage.local:
            return self._listed_here()
        stamp = time_stamp()
        return self._cache.get("listing", stamp, lambda _: self._listed_elsewhere(), _bytes_of_list)

    def status(self, run_id: str) -> RunStatus:
        self._check(run_id)
        return self._status(run_id)

    def spec(self, run_id: str) -> dict[str, Any]:
        """As plain data; secrets are blanked in the file already."""
        reader = self._reader(run_id)
        stamp = file_stamp(reader.storage, SPEC, _SMALL_FILE_BYTES)

        def read(_: Any) -> dict[str, Any]:
            check_size(reader.storage, SPEC, _SMALL_FILE_BYTES)
            spec = reader.read_spec()
            _check_values(spec, f"{reader.url}/{SPEC}")
            return spec

        return self._cache.get((run_id, SPEC), stamp, read, lambda _: _SMALL_FILE_BYTES)

    def metrics(self, run_id: str) -> pa.Table:
        """METRICS_SCHEMA, all steps in order."""
        reader = self._reader(run_id)
        if reader.storage.local:
            stamp: Any = frozenset(part_stamps(reader.storage, METRICS, _TABLE_BYTES).items())
        else:
            stamp = time_stamp()
        return self._cache.get(
            (run_id, METRICS), stamp, lambda _: reader.read_metrics(), lambda table: table.nbytes
        )

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """The newest EVENTS_READ by time.

        Raises:
            RunDirectoryError: one of them is broken.
        """
        reader = self._reader(run_id)
        names = [name for name in reader.storage.names(EVENTS) if name.endswith(".json")]
        names = [f"{EVENTS}/{name}" for name in names[-EVENTS_READ:]]

        def read(known: dict[str, dict[str, Any] | str] | None) -> dict[str, Any]:
            return _parsed(reader, names, known or {})

        key = (run_id, EVENTS)
        found = self._cache.get(key, tuple(names), read, lambda all_: 1024 * len(all_))
        if broken := [event for event in found.values() if isinstance(event, str)]:
            self._cache.put(key, None, found, 1024 * len(found))  # looked at anew the next time
            raise RunDirectoryError(broken[0])
        return list(found.values())

    def sample_steps(self, run_id: str) -> list[int]:
        """Steps that have samples, ascending."""
        return self._reader(run_id).sample_steps()

    def samples(self, run_id: str, step: int) -> pa.Table:
        """The rollouts of `step`: SAMPLES_WITH_TEXT."""
        reader, name = self._reader(run_id), f"{SAMPLES_DIRECTORY}/{samples_name(step)}"
        try:
            stamp = file_stamp(reader.storage, name, _TABLE_BYTES)
            check_size(reader.storage, name, _TABLE_BYTES)
        except NotFoundError:
            raise NotFoundError(f"{reader.url}: no samples of step {step}") from None
        return self._cache.get(
            (run_id, name), stamp, lambda _: reader.read_samples(step), lambda table: table.nbytes
        )

    def cancel(self, run_id: str) -> RunStatus:
        """Ask the driver to stop after its step, unless the run has ended; the status till then."""
        status = self.status(run_id)
        if not status.state.ended:
            RunDirectory(self._reader(run_id).storage, run_id).request_cancel()
        return status

    def _status(self, run_id: str) -> RunStatus:
        name = f"{run_id}/{STATUS}"
        try:
            stamp = file_stamp(self.storage, name, _SMALL_FILE_BYTES)
            return self._cache.get(
                (run_id, STATUS), stamp, lambda _: self._read_status(run_id), lambda _: 4096
            )
        except NotFoundError:
            raise NotFoundError(f"{self.storage.url}/{run_id}: no such run, or not begun") from None

    def _read_status(self, run_id: str) -> RunStatus:
        storage = self._reader(run_id, must_exist=False).storage  # a link out of the run is refused
        check_size(storage, STATUS, _SMALL_FILE_BYTES)
        return _of(run_id, storage.read(STATUS), f"{storage.url}/{STATUS}")

    def _listed_here(self) -> Listing:
        statuses, broken = [], []
        for run_id, is_link in self._run_ids_here():
            try:
                if is_link:
                    self._check(run_id)
                statuses.append(self._status(run_id))
            except NotFoundError:
                continue  # another directory, or a run that has not begun
            except RunDirectoryError as error:
                broken.append(str(error))
        return _sorted(statuses, broken)

    def _run_ids_here(self) -> list[tuple[str, bool]]:
        """With whether each is a link."""
        try:
            with (
                storage_errors(f"{self.storage.url}: cannot be listed", pass_absent=True),
                os.scandir(self.storage.root) as entries,
            ):
                return [(one.name, one.is_symlink()) for one in entries if is_run_id(one.name)]
        except FileNotFoundError:
            return []

    def _listed_elsewhere(self) -> Listing:
        names = [f"{name}/{STATUS}" for name in self.storage.names() if is_run_id(name)]
        statuses, broken = [], []
        for name, content in self.storage.read_all(names).items():
            try:
                run_id = name.partition("/")[0]
                statuses.append(_of(run_id, content, f"{self.storage.url}/{name}"))
            except RunDirectoryError as error:
                broken.append(str(error))
        return _sorted(statuses, broken)

    def _reader(self, run_id: str, *, must_exist: bool = True) -> _CachedReader:
        self._check(run_id)
        reader = _CachedReader(f"{self.run_root.rstrip('/')}/{run_id}", self._cache)
        if must_exist and not self._exists(reader):
            raise NotFoundError(f"{reader.url}: no such run")
        return reader

    def _exists(self, reader: RunReader) -> bool:
        if reader.storage.local:
            return reader.exists()
        key, stamp = (reader.run_id, "exists"), time_stamp()
        return self._cache.get(key, stamp, lambda _: reader.exists(), lambda _: 1)

    def _check(self, run_id: str) -> None:
        """Raises NotFoundError unless `run_id` names a directory of its own under the root."""
        if not is_run_id(run_id):
            shown = run_id if len(run_id) <= 40 else f"{run_id[:40]}..."
            raise NotFoundError(
                f"run id: found {shown!r}, expected a lower-case letter, then letters, digits or "
                f"'-', at most 40; see the list of runs"
            )
        path = f"{self.storage.root}/{run_id}"
        if self.storage.local and os.path.islink(path):
            raise RunDirectoryError(
                f"{path}: found a link, expected a directory; links are refused"
            )


class _CachedReader(RunReader):
    """Reads a part of the metrics again only where it has changed."""

    def __init__(self, url: str, cache: Cache) -> None:
        super().__init__(url)
        self._cache = cache

    def read_metrics_parts(self, names: Sequence[str]) -> dict[str, pa.Table | None]:
        stamps = part_stamps(self.storage, METRICS, _TABLE_BYTES)
        keys = {name: (self.run_id, name) for name in names}
        found = {name: self._cache.peek(keys[name], stamps.get(name)) for name in names}
        missing = [name for name, part in found.items() if part is None]
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            for name, part in super().read_metrics_parts(batch).items():
                found[name] = part
                if part is not None and name in stamps:
                    self._cache.put(keys[name], stamps[name], part, part.nbytes)
        return found


def _of(run_id: str, content: bytes, name: str) -> RunStatus:
    if len(content) > _SMALL_FILE_BYTES:
        raise RunDirectoryError(f"{name}: found {len(content):,} bytes, expected a status")
    status = parse_status(content, name)
    if status.run_id != run_id:
        raise RunDirectoryError(
            f"{name}: run_id: found {status.run_id[:60]!r}, expected {run_id!r}, the directory's "
            f"name; rename the directory"
        )
    return status


def _sorted(statuses: list[RunStatus], broken: list[str]) -> Listing:
    newest = sorted(statuses, key=lambda status: (-status.started_at, status.run_id))
    return Listing(newest, sorted(broken))


def _bytes_of_list(listing: Listing) -> int:
    return 4096 * (len(listing.runs) + len(listing.broken))


def _parsed(
    reader: RunReader, names: Sequence[str], known: dict[str, dict[str, Any] | str]
) -> dict[str, dict[str, Any] | str]:
    """Events by file name, in this order; what is wrong with it in place of a broken one.

    An event's file never changes, so what is known is not read again.
    """
    found: dict[str, dict[str, Any] | str] = {
        name: event for name, event in known.items() if not isinstance(event, str)
    }
    contents = reader.storage.read_all([name for name in names if name not in found])
    for name, content in contents.items():
        try:
            found[name] = _event(content, f"{reader.url}/{name}")
        except RunDirectoryError as error:
            found[name] = str(error)
    return {name: found[name] for name in names if name in found}


def _event(content: bytes, name: str) -> dict[str, Any]:
    event = parse_object(content, name)
    if not isinstance(event.get("time"), (int, float)):
        raise RunDirectoryError(f"{name}: time: found no number; delete the file")
    return event


def _check_values(spec: Any, name: str) -> None:
    """A few lines of YAML can stand for any number of values, or hold themselves."""
    left, seen = [spec], 0
    while left:
        value = left.pop()
        seen += 1
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            left.extend(value)
        if seen + len(left) > _SPEC_VALUES:
            raise RunDirectoryError(f"{name}: found over {_SPEC_VALUES:,} values, expected a spec")
