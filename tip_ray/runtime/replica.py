"""One replica of a pool, and what went wrong with it: the place that classifies Ray's errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from tip_ray.contract.errors import ObjectsLostError, ReplicaError, TipRayError


@dataclass
class Replica:
    """An actor at a fixed place of its pool; a replacement has the same index and a new epoch."""

    index: int
    epoch: int
    actor: Any  # ray.actor.ActorHandle
    node_id: str = ""
    weight_version: int = 0
    in_flight: int = 0
    exclusive: bool = False
    lost: bool = field(default=False)  # being replaced: no new work
    weightless: bool = field(default=False)  # its weights are gone: nothing but newer ones


class Located:
    """What every pool actor can say of itself, mixed into a stage's plain class."""

    def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def node_address(self) -> str:
        """Under which the cluster's other nodes reach this one."""
        return str(ray.util.get_node_ip_address())


def actor_class(stage: type) -> Any:
    """A stage's plain class as a Ray actor class; it is never restarted or retried by Ray."""
    located = type(stage.__name__, (stage, Located), {"__module__": __name__})
    return ray.remote(max_restarts=0, max_task_retries=0)(located)


CreateActor = Callable[[int], Any]  # replica index -> ray.actor.ActorHandle


def classify(error: BaseException, who: str) -> TipRayError:
    """A Ray error as ours: ReplicaError where another try may help, ObjectsLostError where only
    making the arguments again does, else the actor's own error."""
    if isinstance(error, TimeoutError):
        return ReplicaError(f"{who}: no answer in time")
    if isinstance(error, ObjectLostError):
        return ObjectsLostError(f"{who}: {type(error).__name__}: {_first_line(error)}")
    if isinstance(error, RayTaskError):
        cause = error.cause
        # An actor cannot report its own death: an argument's maker is dead, and the argument gone.
        if isinstance(cause, (ObjectLostError, RayActorError)):
            return ObjectsLostError(f"{who}: {type(cause).__name__}: {_first_line(cause)}")
        if isinstance(cause, TipRayError) and not isinstance(cause, ReplicaError):
            return cause
        return ReplicaError(f"{who}: {type(cause).__name__}: {_first_line(cause)}")
    if isinstance(error, RayActorError):
        return ReplicaError(f"{who}: died: {_first_line(error)}")
    if isinstance(error, RayError):
        return ReplicaError(f"{who}: {type(error).__name__}: {_first_line(error)}")
    raise error


def kill(actor: Any) -> None:
    """End an actor now; one that is gone already is fine. Ray itself never restarts it."""
    ray.kill(actor, no_restart=True)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no message"
