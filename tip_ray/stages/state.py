"""The learner's training state in safetensors: saved by any number of ranks, read by any other.

Every rank writes one file with its own rows of each parameter and of AdamW's two moments, float32
as they are in memory, and says in the file's header which rank of how many it was. A reader copies
the rows that are its own out of every file, so neither side gathers a whole tensor. Nothing is
pickled.

Whether a set of files is complete and unbroken is for the run's manifest to say; here missing or
foreign rows are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tip_ray.contract.errors import RunDirectoryError

PARAMETER, MOMENTS = "parameter", ("exp_avg", "exp_avg_sq")  # the moments' names are AdamW's
_HEADER = "tip_ray"
_FILES = "learner-*-of-*.safetensors"


@dataclass(frozen=True)
class SavedFile:
    """One file of a checkpoint, as its manifest lists it."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    step: int  # the last step trained
    updates: int  # AdamW's own count: a skipped step makes none
    rank: int
    ranks: int
    shapes: Mapping[str, Sequence[int]]  # of every parameter, over all ranks


def first_row(rows: int, rank: int, ranks: int) -> int:
    """Where FSDP2's shard `rank` of `rows` rows begins; the last shards may be empty."""
    return min(rows, -(-rows // ranks) * rank)


def save_rows(url: str, header: Header, tensors: Mapping[str, Tensor]) -> SavedFile:
    """Write this rank's rows into the directory `url`, under a name that only it uses."""
    fs, folder = fsspec.core.url_to_fs(url)
    name = f"learner-{header.rank:05d}-of-{header.ranks:05d}.safetensors"
    local = isinstance(fs, LocalFileSystem)
    fs.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder if local else None) as made:
        path = Path(made) / name
        metadata = {_HEADER: json.dumps(asdict(header))}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
        saved = SavedFile(name, path.stat().st_size, _sha256_synced(path))
        if local:
            path.rename(Path(folder) / name)
        else:
            fs.put_file(str(path), f"{folder.rstrip('/')}/{name}")
    return saved


def load_rows(
    url: str,
    rank: int,
    ranks: int,
    into: Mapping[str, Mapping[str, Tensor]],
    names: Sequence[str] | None = None,
) -> Header:
    """Fill this rank's rows from the files at `url`; returns what the files agree on.

    Args:
        names: the files that a manifest vouches for; None reads every one that is there.
        into: PARAMETER and each of MOMENTS -> name -> the rank's own rows, written in place.

    Raises:
        RunDirectoryError: no or missing files, a broken one, or those of another student.
    """
    headers: list[Header] = []
    for path in _local_copies(url, names):
        with _opened(url, path) as (file, header):
            _check_names(url, header, into[PARAMETER])
            for name in into[PARAMETER]:
                _copy_rows(file, header, name, rank, ranks, into)
        headers.append(header)
    return _check_together(url, headers)


def read_parameters(url: str) -> Iterator[tuple[str, Tensor]]:
    """Every whole parameter in float32, by name, in the student's own order; one at a time.

    Raises:
        RunDirectoryError: no or missing files, or a broken one.
    """
    with ExitStack() as stack:
        paths = stack.enter_context(_all_local(url))
        parts = [stack.enter_context(_opened(url, path)) for path in paths]
        header = _check_together(url, [header for _, header in parts])
        for name in header.shapes:
            shards = [file.get_tensor(f"{PARAMETER}/{name}") for file, _ in parts]
            yield name, torch.cat(shards)  # files are in order of rank


@contextmanager
def _opened(url: str, path: Path) -> Iterator[tuple[Any, Header]]:
    """One file and what it says of itself; whatever is wrong with it is one line."""
    try:
        with safe_open(path, "pt") as file:
            yield file, Header(**json.loads(file.metadata()[_HEADER]))
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise _refused(url, f"{path.name} cannot be read: {error}") from None


def _check_together(url: str, headers: Sequence[Header]) -> Header:
    """What all files agree on; refuses a set that is incomplete or mixed."""
    if not headers:
        raise _refused(url, "it holds no file of a learner's state")
    if len({(one.step, one.updates, one.ranks) for one in headers}) > 1:
        raise _refused(url, "its files are of different steps or groups")
    missing = set(range(headers[0].ranks)) - {one.rank for one in headers}
    if missing:
        raise _refused(url, f"the file of rank {min(missing)} is missing")
    return headers[0]


def _copy_rows(
    file: Any,
    header: Header,
    name: str,
    rank: int,
    ranks: int,
    into: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Copy the rows of `name` that are both this file's and this rank's."""
    mine = first_row(header.shapes[name][0], rank, ranks)
    theirs = first_row(header.shapes[name][0], header.rank, header.ranks)
    held = file.get_slice(f"{PARAMETER}/{name}").get_shape()[0]
    begin = max(mine, theirs)
    end = min(mine + len(into[PARAMETER][name]), theirs + held)
    if begin >= end:
        return
    for kind in into:
        rows = file.get_slice(f"{kind}/{name}")[begin - theirs : end - theirs]
        into[kind][name][begin - mine : end - mine].copy_(rows)


def _check_names(url: str, header: Header, parameters: Mapping[str, Tensor]) -> None:
    odd = sorted(header.shapes.keys() ^ parameters.keys())
    odd += [
        name
        for name, rows in parameters.items()
        if name not in odd and tuple(header.shapes[name][1:]) != tuple(rows.shape[1:])
    ]
    if odd:
        raise _refused(url, f"it is another student's: they differ in {odd[0]}")


@contextmanager
def _all_local(url: str) -> Iterator[list[Path]]:
    """All of the state's files on this machine at once, in order of rank."""
    fs, folder = fsspec.core.url_to_fs(url)
    if isinstance(fs, LocalFileSystem):
        yield list(_local_copies(url))
        return
    with tempfile.TemporaryDirectory(prefix="tip-ray-read-") as made:
        for path in sorted(fs.glob(f"{folder.rstrip('/')}/{_FILES}")):
            fs.get_file(path, f"{made}/{path.rsplit('/', 1)[-1]}")
        yield sorted(Path(made).iterdir())


@contextmanager
def _fetched(fs: Any, path: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tip-ray-load-") as folder:
        target = Path(folder) / path.rsplit("/", 1)[-1]
        fs.get_file(path, str(target))
        yield target


def _local_copies(url: str, names: Sequence[str] | None = None) -> Iterator[Path]:
    """The state's files on this machine; of a remote directory one at a time."""
    fs, folder = fsspec.core.url_to_fs(url)
    folder = folder.rstrip("/")
    if names is None:
        paths = sorted(fs.glob(f"{folder}/{_FILES}"))
    else:
        paths = [f"{folder}/{name}" for name in names]
    for path in paths:
        if isinstance(fs, LocalFileSystem):
            yield Path(path)
            continue
        with _fetched(fs, path) as copy:
            yield copy


def _sha256_synced(path: Path) -> str:
    """The file's digest, once it is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refused(url: str, why: str) -> RunDirectoryError:
    return RunDirectoryError(f"checkpoint {url}: {why}; remove it, and the one before it is used")
