"""Checkpoints that are whole, broken, unfinished or superseded, without Ray: ranks by hand."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import pickle
import re
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from tip_ray.contract.errors import RunDirectoryError
from tip_ray.contract.headers import QuadrantThresholds
from tip_ray.control.checkpoint import BrokenCheckpointError, Checkpoints, Manifest
from tip_ray.control.storage import Storage
from tip_ray.stages.state import MOMENTS, PARAMETER, Header, first_row, load_rows, save_rows

RANKS, ROWS = 2, 5
FIRST, SECOND = (f"learner-{rank:05d}-of-{RANKS:05d}.safetensors" for rank in range(RANKS))
KINDS = (PARAMETER, *MOMENTS)


def whole(step: int) -> torch.Tensor:
    return torch.arange(ROWS * 3, dtype=torch.float32).reshape(ROWS, 3) + 100 * step


class Ranks:
    """Saves as a gang's ranks do."""

    async def call_same(self, method: str, url: str, step: int) -> list[Any]:
        assert method == "save"
        return [self._save(url, step, rank) for rank in range(RANKS)]

    def _save(self, url: str, step: int, rank: int) -> Any:
        begin, end = (first_row(ROWS, one, RANKS) for one in (rank, rank + 1))
        header = Header(step=step, updates=step, rank=rank, ranks=RANKS, shapes={"w": [ROWS, 3]})
        rows = {f"{kind}/w": whole(step)[begin:end] for kind in KINDS}
        return save_rows(url, header, rows)


class RanksThatDie(Ranks):
    async def call_same(self, method: str, url: str, step: int) -> list[Any]:
        assert method == "save"
        self._save(url, step, 0)
        Path(url, ".saving-half").mkdir()
        Path(url, ".saving-half", SECOND).write_bytes(b"half")
        raise ConnectionError("a rank is gone")


@pytest.fixture(params=["local", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A run directory on a disk, and one on an object store."""
    if request.param == "local":
        yield Storage(str(tmp_path / "run"))
        return
    yield Storage(f"memory://{tmp_path.name}/run")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def manifest_of(step: int, entropy: float = 0.5) -> Callable[..., Manifest]:
    thresholds = QuadrantThresholds(entropy, 0.25)
    cursor = {"epoch": 1, "position": step * 4, "order": "seed"}
    facts = {"step": step, "weight_version": step, "seed": 7, "cursor": cursor}
    return partial(Manifest, **facts, frozen_thresholds=thresholds)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        asyncio.run(checkpoints.save(Ranks(), manifest_of(step), step))


def read_back(url: str, names: list[str]) -> torch.Tensor:
    into = {kind: {"w": torch.zeros(ROWS, 3)} for kind in KINDS}
    load_rows(url, 0, 1, into, names)
    assert all(torch.equal(into[kind]["w"], into[PARAMETER]["w"]) for kind in KINDS)
    return into[PARAMETER]["w"]


def folder(storage: Storage, step: int) -> Path:
    return Path(storage.root, "checkpoints", f"step-{step:08d}")


def test_what_is_saved_comes_back(anywhere: Storage) -> None:
    checkpoints = Checkpoints(anywhere, keep=2)
    save(checkpoints, 2, 4)
    found = Checkpoints(anywhere, keep=2).newest(pytest.fail)
    assert found == manifest_of(4)(files=found.files)
    names = [file.name for file in found.files]
    assert names == [FIRST, SECOND]
    assert torch.equal(read_back(checkpoints.url(4), names), whole(4))


def test_only_the_files_of_the_manifest_are_read(storage: Storage) -> None:
    checkpoints = Checkpoints(storage, keep=2)
    save(checkpoints, 2)
    (folder(storage, 2) / "learner-00002-of-00003.safetensors").write_bytes(b"of someone else")
    assert torch.equal(read_back(checkpoints.url(2), [FIRST, SECOND]), whole(2))


@pytest.mark.parametrize("entropy", [math.inf, math.nan])
def test_thresholds_that_are_not_finite_come_back(storage: Storage, entropy: float) -> None:
    checkpoints = Checkpoints(storage, keep=2)
    asyncio.run(checkpoints.save(Ranks(), manifest_of(2, entropy), 2))
    found = checkpoints.read(2).frozen_thresholds.entropy
    assert found == entropy or (math.isnan(found) and math.isnan(entropy))


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def flip_a_byte(place: Path) -> None:
    content = bytearray((place / SECOND).read_bytes())
    content[-5] ^= 1
    (place / SECOND).write_bytes(content)


def shorten(place: Path) -> None:
    (place / FIRST).write_bytes((place / FIRST).read_bytes()[:-3])


def truncate_the_manifest(place: Path) -> None:
    text = (place / "manifest.json").read_bytes()
    (place / "manifest.json").write_bytes(text[: len(text) // 2])


def empty_the_manifest(place: Path) -> None:
    (place / "manifest.json").write_bytes(b"")


def remove_a_file(place: Path) -> None:
    (place / SECOND).unlink()


def add_a_file(place: Path) -> None:
    (place / "extra.pt").write_bytes(b"")


def put_a_pickle(place: Path) -> None:
    (place / FIRST).write_bytes(pickle.dumps(Payload(place.parents[1] / "ran")))


def take_the_manifest_of_another_step(place: Path) -> None:
    other = place.with_name("step-00000002") / "manifest.json"
    (place / "manifest.json").write_bytes(other.read_bytes())


def list_a_path(place: Path) -> None:
    text = (place / "manifest.json").read_text()
    (place / "manifest.json").write_text(text.replace(FIRST, "../../secret"))


def link_a_file(place: Path) -> None:
    outside = place.parents[2] / "outside"
    (place / FIRST).rename(outside)
    (place / FIRST).symlink_to(outside)


def link_the_manifest(place: Path) -> None:
    (place / "manifest.json").rename(place.parents[2] / "outside")
    (place / "manifest.json").symlink_to(place.parents[2] / "outside")


def link_the_directory(place: Path) -> None:
    place.rename(place.parents[2] / "outside")
    place.symlink_to(place.parents[2] / "outside")


BROKEN = [
    (flip_a_byte, rf"/{SECOND}: its SHA-256 is not the manifest's"),
    (shorten, rf"/{FIRST}: [0-9]+ bytes, not [0-9]+"),
    (truncate_the_manifest, r"/manifest.json: not a whole manifest \(.+\)"),
    (empty_the_manifest, r"/manifest.json: not a whole manifest \(Expecting value: line 1 .+\)"),
    (remove_a_file, rf"/{SECOND}: missing"),
    (add_a_file, r"/extra.pt: not in the manifest"),
    (put_a_pickle, rf"/{FIRST}: [0-9]+ bytes, not [0-9]+"),
    (
        take_the_manifest_of_another_step,
        r"/manifest.json: it is of step 2, not 4",
    ),
    (list_a_path, r"/manifest.json: not a whole manifest \(files.0.name: String should match .+\)"),
    (link_a_file, rf"/{FIRST}: a symbolic link"),
    (link_the_manifest, r"/manifest.json: a symbolic link"),
    (link_the_directory, r": a symbolic link"),
]


@pytest.mark.parametrize(("damage", "line"), BROKEN, ids=[one.__name__ for one, _ in BROKEN])
def test_a_broken_checkpoint_is_skipped_and_replaced(
    storage: Storage, damage: Callable[[Path], None], line: str
) -> None:
    save(Checkpoints(storage, keep=2), 2, 4)
    damage(folder(storage, 4))
    checkpoints, warnings = Checkpoints(storage, keep=2), []
    found = checkpoints.newest(warnings.append)
    assert found is not None
    assert found.step == 2
    expected = rf"checkpoint after step 4 is skipped: checkpoints/step-00000004{line}"
    assert len(warnings) == 1
    assert re.fullmatch(expected, warnings[0]), warnings[0]
    assert not Path(storage.root, "ran").exists()  # nothing was unpickled

    outside = Path(storage.root).parent / "outside"
    before = sorted(outside.rglob("*")) if outside.is_dir() else outside.exists()
    save(checkpoints, 4)
    assert not folder(storage, 4).is_symlink()
    found = checkpoints.newest(pytest.fail)
    assert found is not None
    assert torch.equal(read_back(checkpoints.url(4), [FIRST, SECOND]), whole(4))
    assert before == (sorted(outside.rglob("*")) if outside.is_dir() else outside.exists())


def test_all_broken_means_from_the_start(anywhere: Storage) -> None:
    save(Checkpoints(anywhere, keep=2), 2, 4)
    for step in (2, 4):
        anywhere.write(f"checkpoints/step-{step:08d}/{FIRST}", b"x")
    warnings: list[str] = []
    assert Checkpoints(anywhere, keep=2).newest(warnings.append) is None
    assert len(warnings) == 2


def test_a_pickle_that_the_manifest_vouches_for_is_not_run_either(storage: Storage) -> None:
    checkpoints, marker = Checkpoints(storage, keep=2), Path(storage.root, "ran")
    save(checkpoints, 2)
    content = pickle.dumps(Payload(marker))
    place = folder(storage, 2) / "manifest.json"
    manifest = json.loads(place.read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][0] |= {"nbytes": len(content), "sha256": digest}
    place.write_text(json.dumps(manifest))
    (folder(storage, 2) / FIRST).write_bytes(content)
    checkpoints.read(2)
    with pytest.raises(RunDirectoryError, match=f"{FIRST} cannot be read") as refused:
        read_back(checkpoints.url(2), [FIRST, SECOND])
    assert "\n" not in str(refused.value)
    assert not marker.exists()
    pickle.loads(content)  # noqa: S301 - the payload would have worked
    assert marker.exists()


def test_what_cannot_be_read_is_not_taken_for_broken(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(Checkpoints(storage, keep=2), 2, 4)

    def silent(name: str) -> Any:
        raise RunDirectoryError(f"{name}: cannot be read (Connection timed out)")

    monkeypatch.setattr(storage, "digest", silent)
    with pytest.raises(RunDirectoryError, match="timed out") as error:
        Checkpoints(storage, keep=2).newest(pytest.fail)
    assert not isinstance(error.value, BrokenCheckpointError)


def test_another_releases_checkpoint_is_refused_not_thrown_away(storage: Storage) -> None:
    save(Checkpoints(storage, keep=2), 2)
    place = folder(storage, 2) / "manifest.json"
    place.write_text(place.read_text().replace('"format": 1', '"format": 2, "new": []'))
    expected = "of format 2, this release reads 1; go on with the release that wrote it"
    with pytest.raises(RunDirectoryError, match=expected):
        Checkpoints(storage, keep=2).newest(pytest.fail)


def test_the_newest_are_kept(anywhere: Storage) -> None:
    checkpoints = Checkpoints(anywhere, keep=2)
    for step, expected in ((2, [2]), (4, [2, 4]), (6, [4, 6]), (7, [6, 7])):
        save(checkpoints, step)
        assert checkpoints.steps() == expected
    assert anywhere.names("checkpoints") == ["step-00000006", "step-00000007"]


def test_a_broken_one_does_not_count_among_those_kept(anywhere: Storage) -> None:
    save(Checkpoints(anywhere, keep=3), 2, 3, 4)
    anywhere.write(f"checkpoints/step-00000004/{FIRST}", b"x")
    checkpoints = Checkpoints(anywhere, keep=2)
    assert checkpoints.newest([].append).step == 3
    save(checkpoints, 5)  # every_steps may change on resume, so that 4 is not written again
    assert checkpoints.steps() == [3, 5]


def test_a_future_that_is_made_anew_is_dropped_once_there_is_a_new_one(anywhere: Storage) -> None:
    save(Checkpoints(anywhere, keep=3), 2, 6, 8)
    for step in (6, 8):
        anywhere.write(f"checkpoints/step-{step:08d}/{FIRST}", b"x")
    checkpoints = Checkpoints(anywhere, keep=2)
    assert checkpoints.newest([].append).step == 2
    assert checkpoints.steps() == [2, 6, 8]
    save(checkpoints, 3)
    assert checkpoints.steps() == [2, 3]


def test_an_unfinished_one_is_invisible_and_cleared(storage: Storage) -> None:
    checkpoints = Checkpoints(storage, keep=2)
    save(checkpoints, 2)
    for step in (4, 6):
        with pytest.raises(ConnectionError):
            asyncio.run(checkpoints.save(RanksThatDie(), manifest_of(step), step))
    assert checkpoints.steps() == [2]
    assert checkpoints.newest(pytest.fail).step == 2
    save(checkpoints, 4)  # over what is left
    assert storage.names("checkpoints/step-00000004") == [FIRST, SECOND, "manifest.json"]
    checkpoints.clear_unfinished()
    assert storage.names("checkpoints") == ["step-00000002", "step-00000004"]


def test_hashing_does_not_read_a_file_into_memory(storage: Storage) -> None:
    Path(storage.root).mkdir()
    nbytes = 128 << 20
    with Path(storage.root, "huge").open("wb") as file:
        file.truncate(nbytes)
    tracemalloc.start()
    try:
        assert storage.digest("huge")[0] == nbytes
        assert tracemalloc.get_traced_memory()[1] < nbytes / 8
    finally:
        tracemalloc.stop()
