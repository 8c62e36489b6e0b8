"""The run's actors: which class, with which part of the spec, in which bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tip_ray.contract.spec import LearnerSpec, RolloutSpec, RunSpec, TeacherSpec
from tip_ray.runtime.gang import Gang
from tip_ray.runtime.pool import OnEvent, Pool
from tip_ray.runtime.replica import actor_class
from tip_ray.runtime.tasks import together
from tip_ray.stages.fsdp import TeacherModel
from tip_ray.stages.learner import LearnerActor
from tip_ray.stages.pair_checks import PairFacts
from tip_ray.stages.rollout import RolloutActor
from tip_ray.stages.selector import SelectorActor
from tip_ray.stages.teacher import TeacherActor


@dataclass(frozen=True)
class Stages:
    """The pools of a run, started."""

    rollout: Pool
    teacher: Pool
    selector: Pool
    learner: Gang


PoolSpec = RolloutSpec | TeacherSpec | LearnerSpec
_TEACHER_IN_FLIGHT = 2  # the next batch's tables arrive while this one is scored


def make_stages(
    spec: RunSpec, facts: PairFacts, groups: Mapping[str, PlacementGroup], on_event: OnEvent
) -> Stages:
    """All pools of `spec`, not yet started."""
    return Stages(
        rollout=make_rollout_pool(spec, facts, groups, on_event),
        teacher=_pool(
            "teacher", _teacher(spec, facts, groups["teacher"]), spec, on_event, _TEACHER_IN_FLIGHT
        ),
        selector=_pool("selector", _selector(spec, facts), spec, on_event),
        learner=Gang(
            "learner",
            _learner(spec, facts, groups["learner"]),
            spec.learner.replicas,
            timeout_s=spec.faults.item_timeout_s,
        ),
    )


def make_rollout_pool(
    spec: RunSpec, facts: PairFacts, groups: Mapping[str, PlacementGroup], on_event: OnEvent
) -> Pool:
    """The rollout pool alone, not yet started."""
    return _pool("rollout", _rollout(spec, facts, groups["rollout"]), spec, on_event)


async def start_stages(stages: Stages) -> None:
    """Start all pools side by side; raises what the first to fail raises."""
    pools = (stages.rollout, stages.teacher, stages.selector, stages.learner)
    await together(*(pool.start() for pool in pools))


def close_stages(stages: Stages) -> None:
    """End every actor."""
    for pool in (stages.rollout, stages.teacher, stages.selector, stages.learner):
        pool.close()


def _pool(
    name: str,
    create: Callable[[int], Any],
    spec: RunSpec,
    on_event: OnEvent,
    in_flight: int = 1,
) -> Pool:
    section = getattr(spec, name, None)
    return Pool(
        name,
        create,
        section.replicas if section is not None else 1,
        timeout_s=spec.faults.item_timeout_s,
        max_tries=spec.faults.max_tries,
        on_event=on_event,
        in_flight=in_flight,
    )


def _in_bundle(stage: type, section: PoolSpec, group: PlacementGroup) -> Callable[[int], Any]:
    """Options for one replica: all of its bundle, and nothing beside it."""
    remote = actor_class(stage)

    def place(index: int) -> Any:
        return remote.options(
            num_cpus=section.num_cpus,
            num_gpus=section.num_gpus,
            resources=section.resources,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            ),
        )

    return place


def _rollout(spec: RunSpec, facts: PairFacts, group: PlacementGroup) -> Callable[[int], Any]:
    place = _in_bundle(RolloutActor, spec.rollout, group)
    longest = max(
        [
            spec.rollout.max_response_tokens,
            *(entry.max_response_tokens for entry in spec.evaluation),
        ]
    )
    return lambda index: place(index).remote(
        spec.student,
        spec.rollout,
        model_path=facts.student_path,
        vocab_size=facts.vocab_size,
        k=facts.support_k,
        eos_ids=facts.eos_ids,
        max_model_tokens=spec.rollout.max_prompt_tokens + longest,
        seed=spec.seed,
        reward=spec.reward,
    )


def _teacher(spec: RunSpec, facts: PairFacts, group: PlacementGroup) -> Callable[[int], Any]:
    place = _in_bundle(TeacherActor, spec.teacher, group)
    return lambda index: place(index).remote(
        spec.teacher,
        model_path=facts.teacher_path,
        vocab_size=facts.vocab_size,
        k=facts.support_k,
        support_source=spec.support_source,
        tail_floor_nats=spec.loss.tail_floor_nats,
        # The prompt limit holds for the teacher's rendering too.
        max_row_tokens=spec.rollout.max_prompt_tokens + spec.rollout.max_response_tokens,
    )


def _selector(spec: RunSpec, facts: PairFacts) -> Callable[[int], Any]:
    remote = actor_class(SelectorActor).options(num_cpus=0)
    return lambda _index: remote.remote(
        spec.selection,
        spec.loss,
        vocab_size=facts.vocab_size,
        ranks=spec.learner.replicas,
        samples=spec.samples_per_step,
        seed=spec.seed,
    )


def _learner(spec: RunSpec, facts: PairFacts, group: PlacementGroup) -> Callable[[int], Any]:
    place = _in_bundle(LearnerActor, spec.learner, group)
    hidden = spec.teacher.targets == "hidden"
    return lambda rank: place(rank).remote(
        spec.student,
        spec.learner,
        spec.loss,
        model_path=facts.student_path,
        vocab_size=facts.vocab_size,
        width=facts.teacher_hidden if hidden else spec.selected_width(facts.support_k),
        steps=spec.steps,
        rank=rank,
        seed=spec.seed,
        teacher=TeacherModel(spec.teacher, facts.teacher_path) if hidden else None,
    )
