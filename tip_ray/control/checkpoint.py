"""Checkpoints: the learner's files, and one manifest that makes them count.

    checkpoints/step-00000020/learner-*.safetensors     each rank's own rows
    checkpoints/step-00000020/manifest.json             written last: it is the commit

A directory without a valid manifest does not exist. The manifest is JSON, the files are
safetensors, and every file's size and SHA-256 are checked before any is opened. The ranks open
them moments later: whoever changes them in between is believed, and still nothing is unpickled.

What cannot be read at all (storage that does not answer, another release's format) is not taken
for broken: going on without it would throw good work away, so it ends the attempt to resume.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tip_ray.contract.errors import RunDirectoryError
from tip_ray.contract.headers import QuadrantThresholds
from tip_ray.control.storage import Storage
from tip_ray.runtime.gang import Gang

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
FORMAT = 1

Warn = Callable[[str], None]


class BrokenCheckpointError(RunDirectoryError):
    """A checkpoint is there but is not what was written."""


class ManifestFile(BaseModel):
    """One file of the learner's state."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^learner-[0-9]{5}-of-[0-9]{5}\.safetensors$")
    nbytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """Everything that a run goes on from, beside the learner's files."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    format: int = FORMAT
    step: int = Field(ge=1)
    """The last step trained: the first untrained one is the next."""
    weight_version: int
    seed: int
    """The run's; every draw derives from it and the names of the work."""
    cursor: dict[str, int | str]
    """Where the prompts of the next step begin."""
    frozen_thresholds: QuadrantThresholds
    """The selector's state: quadrant thresholds of step 1."""
    files: tuple[ManifestFile, ...] = Field(min_length=1)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        storage: the run directory's.
        keep: how many to keep, newest first.
    """

    def __init__(self, storage: Storage, keep: int) -> None:
        self._storage, self._keep = storage, keep
        self._broken: set[int] = set()

    def url(self, step: int) -> str:
        """The directory of the checkpoint after `step`."""
        return f"{self._storage.url}/{_name(step)}"

    async def save(self, learner: Gang, manifest: Callable[..., Manifest], step: int) -> None:
        """Let all ranks write, commit, and drop what is older than the newest `keep`.

        Args:
            manifest: makes the manifest from its `files`.

        Raises:
            ReplicaError: a rank died; there is no manifest, so no checkpoint.
            LeaseLostError: another driver has taken the run over.
            RunDirectoryError: it cannot be written.
        """
        await asyncio.to_thread(self._clear, step)
        saved = await learner.call_same("save", self.url(step), step)
        files = tuple(ManifestFile.model_validate(asdict(one)) for one in saved)
        await asyncio.to_thread(self._commit, manifest(files=files))

    def newest(self, warn: Warn) -> Manifest | None:
        """The newest checkpoint that is whole; broken ones are skipped, and `warn` hears why.

        Raises:
            RunDirectoryError: one cannot be read, so whether it is whole remains unknown.
        """
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except BrokenCheckpointError as error:
                self._broken.add(step)
                warn(f"checkpoint after step {step} is skipped: {error}")
        return None

    def steps(self) -> list[int]:
        """Steps whose checkpoint has a manifest, whole or not, ascending."""
        return [step for step in self._begun() if self._is_committed(step)]

    def clear_unfinished(self) -> None:
        """Remove what a driver that was killed, or a rank, left of checkpoints without manifest."""
        for step in self._begun():
            if not self._is_committed(step):
                self._clear(step)

    def read(self, step: int) -> Manifest:
        """The manifest of `step`, once all of its files have been checked against it.

        Raises:
            BrokenCheckpointError: it, or a file, is not what was written, or a file is missing.
            NotFoundError: there is none.
            RunDirectoryError: it cannot be read, or another release wrote it.
        """
        self._refuse_links(step)
        place = f"{_name(step)}/{MANIFEST}"
        manifest = _parsed(place, self._storage.read(place))
        if manifest.step != step:
            raise BrokenCheckpointError(f"{place}: it is of step {manifest.step}, not {step}")
        self._check_files(step, manifest)
        return manifest

    def _begun(self) -> list[int]:
        names = self._storage.names(CHECKPOINTS)
        numbers = [name.removeprefix("step-") for name in names if name.startswith("step-")]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _is_committed(self, step: int) -> bool:
        if self._storage.is_link(_name(step)):
            return True  # it is read, and refused
        return MANIFEST in self._storage.names(_name(step))

    def _refuse_links(self, step: int) -> None:
        """A link may lead to what others write, whatever its content is now."""
        links = [_name(step)] if self._storage.is_link(_name(step)) else []
        if not links:
            places = [f"{_name(step)}/{name}" for name in self._storage.names(_name(step))]
            links = [place for place in places if self._storage.is_link(place)]
        if links:
            raise BrokenCheckpointError(f"{links[0]}: a symbolic link")

    def _check_files(self, step: int, manifest: Manifest) -> None:
        listed = {file.name for file in manifest.files}
        there = set(self._storage.names(_name(step))) - {MANIFEST}
        for odd, what in ((listed - there, "missing"), (there - listed, "not in the manifest")):
            if odd:
                raise BrokenCheckpointError(f"{_name(step)}/{min(odd)}: {what}")
        for file in manifest.files:
            place = f"{_name(step)}/{file.name}"
            nbytes, sha256 = self._storage.digest(place)
            if nbytes != file.nbytes:
                raise BrokenCheckpointError(f"{place}: {nbytes} bytes, not {file.nbytes}")
            if sha256 != file.sha256:
                raise BrokenCheckpointError(f"{place}: its SHA-256 is not the manifest's")

    def _commit(self, manifest: Manifest) -> None:
        place = f"{_name(manifest.step)}/{MANIFEST}"
        self._storage.write(place, manifest.model_dump_json(indent=1).encode())
        self._broken.discard(manifest.step)
        for step in self._superseded(manifest.step):
            self._clear(step)
            self._broken.discard(step)

    def _superseded(self, newest: int) -> Iterator[int]:
        """What is older than the newest `keep`, broken, or of a future that was made anew."""
        steps = self.steps()
        good = [step for step in steps if step <= newest and step not in self._broken]
        yield from set(steps) - set(good[-self._keep :])

    def _clear(self, step: int) -> None:
        """Remove a checkpoint, its manifest first; also what an unfinished one left."""
        if not self._storage.is_link(_name(step)):
            place = f"{_name(step)}/{MANIFEST}"
            if not self._storage.is_link(place):
                self._storage.delete(place)
        self._storage.remove_tree(_name(step))


def _parsed(place: str, content: bytes) -> Manifest:
    try:
        found = json.loads(content)
        written_in = found.get("format") if isinstance(found, dict) else None
        if isinstance(written_in, int) and written_in != FORMAT:
            raise RunDirectoryError(
                f"{place}: of format {written_in}, this release reads {FORMAT}; go on with the "
                f"release that wrote it"
            )
        return Manifest.model_validate(found)
    except ValueError as error:  # JSON's, and pydantic's
        raise BrokenCheckpointError(f"{place}: not a whole manifest ({_reason(error)})") from None


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return " ".join(f"{where}: {first['msg']}".split())
    return " ".join(str(error).split())


def _name(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:08d}"
