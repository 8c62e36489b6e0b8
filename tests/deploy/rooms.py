"""What a pod has to hold of its run's models: on its scratch volume, in memory, in Ray's store.

P  parameters of the student    R  learner ranks
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.deploy.manifests import Document
from tip_ray.contract.spec import RunSpec
from tip_ray.control.plan import make_plan
from tip_ray.control.plan_devices import models_of
from tip_ray.control.plan_memory import FLOAT32_BYTES, weight_bytes

STORE_SHARE = 0.3  # of a node's memory, Ray's default for its object store
ON_A_HUB = 2  # bytes a parameter
VERSIONS = 2  # of the weights, at most alive
STATE = 3 * FLOAT32_BYTES  # a parameter of a checkpoint: itself and two moments
UNITS = {"Gi": 2**30, "Mi": 2**20}


@dataclass(frozen=True)
class Room:
    """Bytes that one pod needs at least."""

    scratch: float  # downloads, and what is written before it is sent to a bucket
    memory: float  # of its processes; what is in the store comes on top
    store: float = 0.0


def room_problems(cluster: Document, spec: RunSpec) -> Iterator[str]:
    """Every pod of `cluster`, with the models that `spec` names."""
    needed = _rooms(cluster, spec)
    yield from _too_small("head", cluster["headGroupSpec"]["template"], needed["head"])
    for group in cluster["workerGroupSpecs"]:
        name = group["groupName"]
        yield from _too_small(name, group["template"], needed[name])


def _rooms(cluster: Document, spec: RunSpec) -> dict[str, Room]:
    models, sync = models_of(spec), make_plan(spec).weight_sync_bytes
    assert models.student is not None
    assert models.teacher is not None
    assert sync is not None
    student, teacher = (weight_bytes(one, ON_A_HUB) for one in (models.student, models.teacher))
    (learner,) = (one for one in cluster["workerGroupSpecs"] if one["groupName"] == "learner")
    ranks = float(learner["resources"]["tip_learner"])  # in one pod
    saved = ranks * STATE * models.student.parameters / spec.learner.replicas
    loaded = ranks * FLOAT32_BYTES * models.student.parameters  # each rank, before it is sharded
    return {
        "head": Room(scratch=student + teacher, memory=0),  # the driver downloads what it checks
        "rollout": Room(scratch=student, memory=student, store=VERSIONS * sync),
        "teacher": Room(scratch=teacher, memory=teacher),
        "learner": Room(student + sync + saved, max(loaded, saved), VERSIONS * sync),
    }


def _too_small(what: str, template: Document, room: Room) -> Iterator[str]:
    pod = template["spec"]
    (scratch,) = (one["emptyDir"] for one in pod["volumes"] if one["name"] == "scratch")
    memory = _bytes(pod["containers"][0]["resources"]["limits"]["memory"])
    for name, has, needs in (
        ("scratch", _bytes(scratch["sizeLimit"]), room.scratch),
        ("memory", memory, room.memory + room.store),
        ("object store", STORE_SHARE * memory, room.store),
    ):
        if has < needs:
            yield f"{what}: {name} of {has / 1e9:.1f} GB, at least {needs / 1e9:.1f} are needed"


def _bytes(quantity: str) -> float:
    return float(quantity[:-2]) * UNITS[quantity[-2:]]
