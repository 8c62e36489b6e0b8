"""Files under one root on any fsspec file system, with names that cannot leave it.

Every failure of a file system becomes one line: NotFoundError where a file is absent,
RunDirectoryError otherwise.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from tip_ray.contract.errors import NotFoundError, RunDirectoryError

# There a directory is only a prefix, and making one may make a bucket.
_OBJECT_STORES = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"}
)
# Packages of file systems whose errors are not all OSError.
_STORE_PACKAGES = frozenset(
    {"botocore", "aiobotocore", "s3fs", "gcsfs", "google", "adlfs", "azure", "aiohttp"}
)
_PIECE_BYTES = 1 << 20


@contextmanager
def storage_errors(what: str, *, pass_absent: bool = False) -> Iterator[None]:
    """Turn errors of file systems into `RunDirectoryError("<what> (<reason>)")`.

    `pass_absent` lets FileNotFoundError through, where its absence means something.
    """
    try:
        yield
    except BaseException as error:
        if not _of_storage(error) or (pass_absent and isinstance(error, FileNotFoundError)):
            raise
        raise RunDirectoryError(f"{what} ({_reason(error)})") from error


def _of_storage(error: BaseException) -> bool:
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, ImportError)) or package in _STORE_PACKAGES


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def open_root(url: str) -> tuple[Any, str]:
    """(file system, path) of `url`.

    Raises:
        RunDirectoryError: the URL's file system is unknown, not installed or not configured.
    """
    try:
        with storage_errors(f"{url}: its file system cannot be opened"):
            filesystem, path = url_to_fs(url)
    except ValueError as error:
        raise RunDirectoryError(f"{url}: {_reason(error)}; give a path or an fsspec URL") from None
    return filesystem, str(path)


class Storage:
    """The files under `url`."""

    def __init__(self, url: str) -> None:
        self.filesystem, root = open_root(url)
        self.local = isinstance(self.filesystem, LocalFileSystem)
        self.root = root.rstrip("/") or "/"
        self._object_store = not self.local and _protocols(self.filesystem) & _OBJECT_STORES
        self.before_change: Callable[[], None] = _anyone
        """Called before everything that changes a file; what it raises forbids the change."""

    @property
    def url(self) -> str:
        """An absolute path where the file system is local, else a URL."""
        return self.root if self.local else str(self.filesystem.unstrip_protocol(self.root))

    def path(self, name: str) -> str:
        """The file system's own path of `name`, which may not leave the root.

        Raises:
            RunDirectoryError: `name` is absolute, has an empty or dotted part, or is a symbolic
                link that leads out of the root.
        """
        parts = name.split("/")
        if (
            not name
            or "\\" in name
            or "\0" in name
            or any(part in ("", ".", "..") for part in parts)
        ):
            raise RunDirectoryError(f"{name!r}: not a name inside {self.root}")
        path = str(PurePosixPath(self.root) / name) if self.local else f"{self.root}/{name}"
        if self.local:
            root = os.path.realpath(self.root)
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise RunDirectoryError(f"{path}: a link out of {self.root}; remove it")
        return path

    def read(self, name: str) -> bytes:
        """Raises NotFoundError or RunDirectoryError."""
        path = self.path(name)
        try:
            with storage_errors(f"{path}: cannot be read", pass_absent=True):
                return bytes(self.filesystem.cat_file(path))
        except (FileNotFoundError, KeyError):
            raise NotFoundError(f"{path}: no such file") from None

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Those of `names` that are there, in this order; at once where the file system can."""
        if self.local:
            return dict(self._present(names))
        paths = {self.path(name): name for name in names}
        if not paths:
            return {}
        with storage_errors(f"{self.root}: cannot be read"):
            found = self.filesystem.cat(list(paths), on_error="omit")
        return {name: bytes(found[path]) for path, name in paths.items() if path in found}

    def _present(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            with suppress(NotFoundError):
                yield name, self.read(name)

    def write(self, name: str, content: bytes) -> None:
        """Replace `name` whole: readers see the old content or the new, never half of one."""
        path = self.path(name)
        self.before_change()
        with storage_errors(f"{path}: cannot be written"):
            self._make_parent(path)
            if self.local:
                _write_local(path, content)
            else:
                self.filesystem.pipe_file(path, content)

    def append(self, name: str, content: bytes) -> None:
        """Add to the end of `name`; on an object store, by writing it anew."""
        if not self.local:
            self.write(name, (self.read(name) if self.exists(name) else b"") + content)
            return
        path = self.path(name)
        self.before_change()
        with storage_errors(f"{path}: cannot be written"):
            self._make_parent(path)
            with open(path, "ab") as file:
                file.write(content)

    def exists(self, name: str) -> bool:
        path = self.path(name)
        with storage_errors(f"{path}: cannot be looked up"):
            self.filesystem.invalidate_cache()
            return bool(self.filesystem.exists(path))

    def names(self, directory: str = "") -> list[str]:
        """Sorted last parts of what lies in `directory`; empty if it does not exist."""
        path = self.path(directory) if directory else self.root
        try:
            with storage_errors(f"{path}: cannot be listed", pass_absent=True):
                self.filesystem.invalidate_cache()
                entries = self.filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return []
        paths = {str(entry).rstrip("/") for entry in entries} - {path.rstrip("/")}
        return sorted(entry.rpartition("/")[2] for entry in paths)

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if it is not there."""
        path = self.path(name)
        self.before_change()
        try:
            with storage_errors(f"{path}: cannot be removed", pass_absent=True):
                self.filesystem.rm_file(path)
        except (FileNotFoundError, KeyError):
            return

    def digest(self, name: str) -> tuple[int, str]:
        """(bytes, SHA-256) of a file, read in pieces; raises NotFoundError or RunDirectoryError."""
        path, sha256, nbytes = self.path(name), hashlib.sha256(), 0
        try:
            with (
                storage_errors(f"{path}: cannot be read", pass_absent=True),
                self.filesystem.open(path, "rb") as file,
            ):
                while piece := file.read(_PIECE_BYTES):
                    sha256.update(piece)
                    nbytes += len(piece)
        except (FileNotFoundError, KeyError):
            raise NotFoundError(f"{path}: no such file") from None
        return nbytes, sha256.hexdigest()

    def is_link(self, name: str) -> bool:
        """Whether `name` is a symbolic link, wherever it leads."""
        return self.local and os.path.islink(self._beside_links(name))

    def remove_tree(self, directory: str) -> None:
        """Remove a directory with all in it; of a link the link, never what it leads to."""
        path = self._beside_links(directory)
        self.before_change()
        try:
            with storage_errors(f"{path}: cannot be removed", pass_absent=True):
                if not self.local:
                    self.filesystem.invalidate_cache()
                    self.filesystem.rm(path, recursive=True)
                elif os.path.islink(path):
                    os.unlink(path)
                else:
                    shutil.rmtree(path)
        except (FileNotFoundError, KeyError):
            return

    def _beside_links(self, name: str) -> str:
        """The path of `name`, which may be a link; its directory may not lead out of the root."""
        directory, _, last = name.rpartition("/")
        return f"{self.path(directory)}/{last}"

    def _make_parent(self, path: str) -> None:
        if not self._object_store:
            self.filesystem.makedirs(path.rpartition("/")[0] or "/", exist_ok=True)


def _anyone() -> None:
    """Whoever has the storage may change it."""


def _protocols(filesystem: fsspec.AbstractFileSystem) -> frozenset[str]:
    protocol = filesystem.protocol
    return frozenset({protocol} if isinstance(protocol, str) else protocol)


def _write_local(path: str, content: bytes) -> None:
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
