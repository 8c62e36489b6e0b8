"""Checkpoints: the learner's files, and one manifest that makes them count.

    checkpoints/step-00000020/learner-*.safetensors     each rank's own rows
    checkpoints/step-00000020/manifest.json             written last: it is the commit

A directory without a valid manifest does not exist. The manifest is JSON, the files are
safetensors, and every file's size and SHA-256 are checked before any is opened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import asdict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tip_ray.contract.errors import NotFoundError, RunDirectoryError
from tip_ray.contract.headers import QuadrantThresholds
from tip_ray.control.storage import Storage
from tip_ray.runtime.gang import Gang

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
FORMAT = 1

Warn = Callable[[str], None]


class ManifestFile(BaseModel):
    """One file of the learner's state."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^learner-[0-9]{5}-of-[0-9]{5}\.safetensors$")
    nbytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """Everything that a run goes on from, beside the learner's files."""

    model_config = ConfigDict(extra="forbid")

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

    def url(self, step: int) -> str:
        """The directory of the checkpoint after `step`."""
        return f"{self._storage.url}/{_name(step)}"

    async def save(self, learner: Gang, manifest: Callable[..., Manifest], step: int) -> None:
        """Let all ranks write, commit, and drop what is older than the newest `keep`.

        Args:
            manifest: makes the manifest from its `files`.

        Raises:
            ReplicaError: a rank died; there is no manifest, so no checkpoint.
            RunDirectoryError: it cannot be written.
        """
        await asyncio.to_thread(self._clear, step)
        saved = await learner.call_same("save", self.url(step), step)
        files = tuple(ManifestFile.model_validate(asdict(one)) for one in saved)
        await asyncio.to_thread(self._commit, manifest(files=files))

    def newest(self, warn: Warn) -> Manifest | None:
        """The newest checkpoint that is whole; broken ones are skipped, and `warn` hears why."""
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except (RunDirectoryError, NotFoundError) as error:
                warn(f"checkpoint after step {step} is skipped: {error}")
        return None

    def steps(self) -> list[int]:
        """Steps whose checkpoint has a manifest, whole or not, ascending."""
        names = self._storage.names(CHECKPOINTS)
        numbers = [name.removeprefix("step-") for name in names if name.startswith("step-")]
        found = sorted(int(number) for number in numbers if number.isdecimal())
        return [step for step in found if self._storage.exists(f"{_name(step)}/{MANIFEST}")]

    def read(self, step: int) -> Manifest:
        """The manifest of `step`, once all of its files have been checked against it.

        Raises:
            NotFoundError: there is none, or a file is missing.
            RunDirectoryError: it, or a file, is not what was written.
        """
        place = f"{_name(step)}/{MANIFEST}"
        try:
            manifest = Manifest.model_validate_json(self._storage.read(place))
        except ValidationError as error:
            reason = " ".join(error.errors()[0]["msg"].split())
            raise RunDirectoryError(f"{place} is broken ({reason})") from None
        if manifest.format != FORMAT or manifest.step != step:
            found = f"format {manifest.format} of step {manifest.step}"
            raise RunDirectoryError(f"{place}: {found}, expected {FORMAT} of step {step}")
        self._check_files(step, manifest)
        return manifest

    def _check_files(self, step: int, manifest: Manifest) -> None:
        listed = {file.name for file in manifest.files}
        there = {name for name in self._storage.names(_name(step)) if name != MANIFEST}
        if there - listed:
            odd = min(there - listed)
            raise RunDirectoryError(f"{_name(step)}/{odd} is not in the manifest; remove it")
        for file in manifest.files:
            nbytes, sha256 = self._storage.digest(f"{_name(step)}/{file.name}")
            if (nbytes, sha256) != (file.nbytes, file.sha256):
                what = "size" if nbytes != file.nbytes else "SHA-256"
                raise RunDirectoryError(f"{_name(step)}/{file.name}: its {what} is another")

    def _commit(self, manifest: Manifest) -> None:
        place = f"{_name(manifest.step)}/{MANIFEST}"
        self._storage.write(place, manifest.model_dump_json(indent=1).encode())
        for step in self._superseded(manifest.step):
            self._clear(step)

    def _superseded(self, newest: int) -> Iterator[int]:
        yield from [step for step in self.steps() if step <= newest][: -self._keep]

    def _clear(self, step: int) -> None:
        """Remove a checkpoint, its manifest first; also what an unfinished one left."""
        self._storage.delete(f"{_name(step)}/{MANIFEST}")
        for name in self._storage.names(_name(step)):
            self._storage.delete(f"{_name(step)}/{name}")
        self._storage.remove_empty(_name(step))


def _name(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:08d}"
