"""The spec's pools as bundles of a cluster's resources."""

from __future__ import annotations

from tip_ray.contract.spec import LearnerSpec, RolloutSpec, RunSpec, TeacherSpec

Bundles = dict[str, list[dict[str, float]]]


def demand(spec: RunSpec) -> Bundles:
    """One bundle a replica, by pool. The selector and the driver reserve nothing."""
    pools: dict[str, RolloutSpec | TeacherSpec | LearnerSpec] = {
        "rollout": spec.rollout,
        "teacher": spec.teacher,
        "learner": spec.learner,
    }
    return {name: [_bundle(pool)] * pool.replicas for name, pool in pools.items()}


def total_cpus(spec: RunSpec) -> int:
    """CPUs that the whole run reserves."""
    return int(sum(one["CPU"] for own in demand(spec).values() for one in own))


def _bundle(pool: RolloutSpec | TeacherSpec | LearnerSpec) -> dict[str, float]:
    bundle: dict[str, float] = {"CPU": pool.num_cpus}
    if pool.num_gpus:
        bundle["GPU"] = pool.num_gpus
    return {**bundle, **pool.resources}
