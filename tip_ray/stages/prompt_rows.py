"""Rows of a prompt file: JSON lines, JSON or parquet at any fsspec URL, or a demo problem set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow.parquet as pq

from tip_ray import demo
from tip_ray.contract.errors import SpecError
from tip_ray.stages.reading import readable

Row = dict[str, Any]
FORMATS = (".jsonl", ".json", ".parquet")
_PACKED = (".gz", ".bz2", ".xz", ".zst")


def read_rows(source: str, field: str = "prompts.source") -> Iterator[tuple[str, Row]]:
    """Yield each row of `source` with its place ("train.jsonl, row 3", counted from 1).

    Args:
        source: demo:NAME, or a .jsonl, .json (a list) or .parquet file, plain or compressed
            (.gz, .bz2, .xz, .zst; not parquet), at any fsspec URL; a glob reads its files by name.
        field: the spec's name for `source`, for errors.

    Raises:
        SpecError: no such file, an empty one, not what its name says, or a row that is no object.
    """
    if source.startswith(demo.PREFIX):
        yield from _demo_rows(source, field)
        return
    found = False
    for fs, path in _files(source, field):
        for number, row in enumerate(_file_rows(fs, path, field), start=1):
            found = True
            place = f"{path.rpartition('/')[2]}, row {number}"
            if not isinstance(row, dict):
                raise SpecError(field, f"{place}: {row!r}"[:80], "an object with named fields")
            yield place, row
    if not found:
        raise SpecError(field, f"{source} without rows", "at least one prompt", "fill the file")


def _demo_rows(source: str, field: str) -> Iterator[tuple[str, Row]]:
    try:
        rows = demo.problems(source)
    except ValueError:
        known = " | ".join(demo.PREFIX + name for name in demo.PROBLEM_SETS)
        raise SpecError(field, repr(source), known) from None
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", dict(row)


def _files(source: str, field: str) -> list[tuple[Any, str]]:
    with readable(field, source, "a readable file", "check the path and its login"):
        fs, path = fsspec.core.url_to_fs(source)
        paths = sorted(fs.glob(path)) if "*" in path else [path]
        missing = not paths or not fs.exists(paths[0])
        if not missing and fs.isdir(paths[0]):
            cure = f"name the files, e.g. {source.rstrip('/')}/*.parquet"
            raise SpecError(field, f"{source}, a directory", "a file or a glob", cure)
    if missing:
        raise SpecError(field, f"no file {source}", "an existing file", "check the path")
    return [(fs, one) for one in paths]


def _file_rows(fs: Any, path: str, field: str) -> Iterator[Any]:
    bare = path
    for packed in _PACKED:
        bare = bare.removesuffix(packed)
    reader = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}.get(
        next((ending for ending in FORMATS if bare.endswith(ending)), "")
    )
    if reader is None:
        raise SpecError(
            field, path, f"a file ending in {', '.join(FORMATS)}", "rename or convert it"
        )
    compression = "infer" if bare != path else None
    with (
        readable(field, path, "a readable file", "restore or convert it"),
        fs.open(path, "rb", compression=compression) as file,
    ):
        yield from reader(file, path, field)


def _json_lines(file: Any, path: str, field: str) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise SpecError(field, f"{path}, line {number}: {error.msg}", "JSON") from None


def _json_list(file: Any, path: str, field: str) -> Iterator[Any]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise SpecError(field, f"{path}, line {error.lineno}: {error.msg}", "JSON") from None
    if not isinstance(rows, list):
        cure = "name it .jsonl if each line is an object"
        raise SpecError(field, f"{path}: {type(rows).__name__}", "a list of objects", cure)
    yield from rows


def _parquet(file: Any, path: str, field: str) -> Iterator[Any]:  # noqa: ARG001
    for batch in pq.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()
