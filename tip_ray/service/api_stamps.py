"""Whether a file is still the one that was read before, and small enough to be read at all.

On a local file system a stamp is the file's identity, so nothing stale is ever shown. Elsewhere it
is a slice of time: what was read is believed for `BELIEVED_S`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Hashable

from tip_ray.contract.errors import NotFoundError, RunDirectoryError
from tip_ray.control.storage import Storage, storage_errors

BELIEVED_S = 2.0


def file_stamp(storage: Storage, name: str, max_bytes: int) -> Hashable:
    """Of one file.

    Raises:
        NotFoundError: it is absent.
        RunDirectoryError: it is no plain file, too large, or a link out of the directory.
    """
    return _local_stamp(storage, name, max_bytes) if storage.local else time_stamp()


def time_stamp() -> Hashable:
    """The same for `BELIEVED_S`."""
    return int(time.monotonic() / BELIEVED_S)


def check_size(storage: Storage, name: str, max_bytes: int) -> None:
    """Where `file_stamp` does not look: raises RunDirectoryError if the file is too large."""
    if storage.local:
        return
    path = storage.path(name)
    try:
        with storage_errors(f"{path}: cannot be looked up", pass_absent=True):
            nbytes = storage.filesystem.size(path)
    except (FileNotFoundError, KeyError):
        return  # reading it says so
    _refuse_above(max_bytes, nbytes or 0, path)


def part_stamps(storage: Storage, directory: str, max_bytes: int) -> dict[str, Hashable]:
    """Of every file in `directory`, by its name under the storage; empty if there is none.

    Raises:
        RunDirectoryError: the directory leads out of the storage or cannot be listed, or a file
            is too large.
    """
    path = storage.path(directory)
    try:
        with storage_errors(f"{path}: cannot be listed", pass_absent=True):
            if storage.local:
                with os.scandir(path) as entries:
                    local = {entry.name: entry.stat() for entry in entries}
                found = {name: (one.st_size, _identity(one)) for name, one in local.items()}
            else:
                storage.filesystem.invalidate_cache()
                infos = storage.filesystem.ls(path, detail=True)
                found = {_last(info["name"]): (info["size"] or 0, str(info)) for info in infos}
    except FileNotFoundError:
        return {}
    for name, (nbytes, _) in found.items():
        _refuse_above(max_bytes, nbytes, f"{path}/{name}")
    return {f"{directory}/{name}": stamp for name, (_, stamp) in found.items()}


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _local_stamp(storage: Storage, name: str, max_bytes: int) -> Hashable:
    path = f"{storage.root}/{name}"
    try:
        with storage_errors(f"{path}: cannot be looked up", pass_absent=True):
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                found = os.stat(storage.path(name))
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: no such file") from None
    if not stat.S_ISREG(found.st_mode):
        raise RunDirectoryError(f"{path}: found no plain file; remove it")
    _refuse_above(max_bytes, found.st_size, path)
    return _identity(found)


def _identity(found: os.stat_result) -> Hashable:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _refuse_above(max_bytes: int, nbytes: int, path: str) -> None:
    if nbytes > max_bytes:
        raise RunDirectoryError(
            f"{path}: found {nbytes:,} bytes, expected at most {max_bytes:,}; "
            f"read it with the command line"
        )
