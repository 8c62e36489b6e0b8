"""What was read is kept as long as its file is the same one, within a bound on memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tip_ray.contract.errors import RunDirectoryError

Value = TypeVar("Value")

_ENTRIES = 20_000
_ENTRY_BYTES = 1024  # of an entry whose value is small


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    stamp: Hashable = None
    begun_at: float = 0.0  # when it began to be made
    value: Any = None
    error: str | None = None
    nbytes: int = 0


class Cache:
    """Values by key, each with the stamp of what it was made from. Safe to share by threads.

    Beyond `max_bytes` the entries that were used longest ago go first.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def get(
        self,
        key: Hashable,
        stamp: Hashable,
        make: Callable[[Value | None], Value],
        nbytes: Callable[[Value], int],
    ) -> Value:
        """The value of `stamp`; several threads that want it wait for one that makes it.

        One that began to be made after this call is new enough, whatever its stamp: else waiting
        threads with an older stamp each would make theirs again.

        Args:
            make: gets the value of an older stamp, if there is one.

        Raises:
            RunDirectoryError: `make` did, for this stamp: a broken file is not read again either.
        """
        entry, asked_at = self._entry(key), time.monotonic()
        with entry.lock:
            known = entry.stamp is not None and entry.stamp == stamp
            if not known and entry.begun_at <= asked_at:
                self._make(key, entry, stamp, make, nbytes)
            if entry.error is not None:
                raise RunDirectoryError(entry.error)
            value: Value = entry.value
            return value

    def _make(self, key: Hashable, entry: _Entry, stamp: Hashable, make: Any, nbytes: Any) -> None:
        entry.begun_at = time.monotonic()
        try:
            value = make(entry.value)
        except RunDirectoryError as error:
            self._keep(key, entry, stamp, None, 0, str(error))
        else:
            self._keep(key, entry, stamp, value, nbytes(value))

    def peek(self, key: Hashable, stamp: Hashable) -> Any:
        """The value of `stamp`, or None."""
        with self._lock:
            entry = self._entries.get(key)
        if entry is None or stamp is None:
            return None
        with entry.lock:
            return entry.value if entry.stamp == stamp else None

    def put(self, key: Hashable, stamp: Hashable, value: Any, nbytes: int) -> None:
        entry = self._entry(key)
        with entry.lock:
            self._keep(key, entry, stamp, value, nbytes)

    def _entry(self, key: Hashable) -> _Entry:
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            return entry

    def _keep(
        self,
        key: Hashable,
        entry: _Entry,
        stamp: Hashable,
        value: Any,
        nbytes: int,
        error: str | None = None,
    ) -> None:
        with self._lock:
            entry.stamp, entry.value, entry.error = stamp, value, error
            if self._entries.get(key) is entry:  # else it was dropped meanwhile
                self._bytes += nbytes + _ENTRY_BYTES - entry.nbytes
                entry.nbytes = nbytes + _ENTRY_BYTES
            while self._bytes > self._max_bytes or len(self._entries) > _ENTRIES:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= oldest.nbytes
