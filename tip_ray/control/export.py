"""A run's checkpoint as a Hugging Face directory, without Ray: what the learner itself exports."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tip_ray.contract.errors import NotFoundError, RunDirectoryError
from tip_ray.contract.spec import StudentSpec
from tip_ray.control.checkpoint import Checkpoints, Manifest
from tip_ray.control.run_reader import RunReader
from tip_ray.control.storage import storage_errors
from tip_ray.stages.export import write_export
from tip_ray.stages.models import local_model_path
from tip_ray.stages.state import read_parameters

# The first numbered part of a name: model.layers.3
_LAYER = re.compile(r"^[^0-9]*?\.[0-9]+(?=\.)")


def export_checkpoint(
    reader: RunReader, step: int | None, url: str, warn: Callable[[str], None]
) -> int:
    """Write the student after `step` to the directory `url`; the step it was.

    The checkpoint's files are checked against its manifest first. Config, tokenizer and the like
    come from the student that the run began with.

    Args:
        step: None for the newest checkpoint that is whole; `warn` hears of those that are not.

    Raises:
        NotFoundError: no such checkpoint, or none at all.
        RunDirectoryError: it is broken, or nothing can be written at `url`.
        SpecError: the run's first student is no longer where it was.
    """
    checkpoints = Checkpoints(reader.storage, keep=1)
    manifest = _manifest(reader, checkpoints, step, warn)
    student = _student(reader)
    path = local_model_path(student.model, student.revision, "student.model", weights=False)
    parameters = read_parameters(checkpoints.url(manifest.step))
    with storage_errors(f"{url}: cannot be written"):
        write_export(url, path, _groups(parameters, student.dtype), student.dtype)
    return manifest.step


def _manifest(
    reader: RunReader, checkpoints: Checkpoints, step: int | None, warn: Callable[[str], None]
) -> Manifest:
    steps = checkpoints.steps()
    if step is None:
        newest = checkpoints.newest(warn)
        if newest is None:
            raise NotFoundError(f"{reader.run_id}: no checkpoint that is whole")
        return newest
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise NotFoundError(f"{reader.run_id}: no checkpoint after step {step}; there are: {there}")
    return checkpoints.read(step)


def _student(reader: RunReader) -> StudentSpec:
    section: Any = reader.read_spec().get("student")
    if not isinstance(section, dict) or not isinstance(section.get("model"), str):
        raise RunDirectoryError(f"{reader.url}/spec.yaml: no student.model in it")
    known = {name: section[name] for name in StudentSpec.model_fields if name in section}
    return StudentSpec.model_validate(known)


def _groups(
    parameters: Iterator[tuple[str, torch.Tensor]], dtype: str
) -> Iterator[dict[str, torch.Tensor]]:
    """As the learner hands them out: what is outside the layers, then layer by layer."""
    rest: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in parameters:
        layer = _LAYER.match(name)
        group = rest if layer is None else layers.setdefault(layer[0], {})
        group[name] = tensor.to(getattr(torch, dtype))
    yield rest
    yield from layers.values()
