"""PROMPTS of one step -> SELECTED: what happens to a step before it is the learner's turn.

Steps are prepared side by side, as many as `max_lag` admits; each passes generate and score (as
they finish), select (the step's barrier) and cut.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tip_ray.contract.errors import ObjectsLostError, ReplicaError, RunFailedError
from tip_ray.contract.headers import (
    CutHeader,
    QuadrantThresholds,
    Quarantined,
    RolloutHeader,
    TeacherHeader,
)
from tip_ray.contract.spec import RunSpec
from tip_ray.control.crew import Stages
from tip_ray.control.journal import Journal
from tip_ray.control.step_metrics import StepTrace
from tip_ray.control.step_work import RolloutWork
from tip_ray.runtime.pool import FAILURES
from tip_ray.runtime.replica import classify
from tip_ray.runtime.tasks import first_leaf, together, value_of, within
from tip_ray.stages.cut import cut
from tip_ray.stages.prompts import Cursor

# On one node: each holds what it keeps a second time until it is done. They reserve no CPU, and
# Ray gives one that it kills for memory no second try.
_CUTS_AT_ONCE = 4


@dataclass(frozen=True)
class _Scored:
    """One teacher batch: references, and where the heavy half lies."""

    header: TeacherHeader
    rollouts: tuple[Any, ...]
    scores: Any
    targets: Any
    node_id: str


@dataclass(frozen=True)
class Prepared:
    """A step that waits for the learner."""

    step: int
    selected: list[list[Any]]  # by rank, references of SELECTED tables
    samples: list[Any]  # references of SAMPLES tables
    quarantined: list[Quarantined]
    cursor: Cursor  # where the next step's prompts begin
    trace: StepTrace


class Preparation:
    """Turns a step's work into what the learner trains on.

    Args:
        frozen: quadrant thresholds of step 1, where a resumed run has them.
    """

    def __init__(
        self,
        spec: RunSpec,
        stages: Stages,
        journal: Journal,
        frozen: QuadrantThresholds | None,
    ) -> None:
        self.frozen = frozen
        self._spec, self._stages, self._journal = spec, stages, journal
        self._first_selected = asyncio.Event()
        if frozen is not None:
            self._first_selected.set()
        # As long as Ray may try a task again it keeps the arguments, here the step's heavy tables,
        # and that is until nobody holds what came out of it.
        self._cut = ray.remote(num_cpus=0, max_retries=0)(cut)

    async def run(self, work: RolloutWork) -> Prepared:
        """PROMPTS of one step -> SELECTED.

        Where tables went with the node that held them the step is made again from its prompts,
        with a higher attempt: what is left of the first try is dropped.

        Raises:
            RunFailedError: that was so `faults.max_tries` times.
        """
        for _ in range(self._spec.faults.max_tries):
            try:
                return await self._prepare_once(work)
            except ObjectsLostError as error:
                self._journal.event("step_made_again", step=work.step, reason=str(error))
                lost, work = error, work.again()
        raise RunFailedError(f"step {work.step}: its tables were lost each time, last: {lost}")

    async def _prepare_once(self, work: RolloutWork) -> Prepared:
        """Generate and score side by side, select, cut."""
        trace = StepTrace(step=work.step, spec=self._spec)
        scored = await self._generate_and_score(work, trace)
        self._refuse_too_many(work)
        keep = await self._select(work, scored, trace)
        return await self._cut_all(work, scored, keep, trace)

    async def _generate_and_score(self, work: RolloutWork, trace: StepTrace) -> list[_Scored]:
        """Consumes PROMPTS, produces scored batches.

        Rollouts go to the teacher as they finish, in batches of `teacher.max_batch_tokens`.
        """
        scored: list[_Scored] = []

        async def score(batch: list[tuple[RolloutHeader, Any]]) -> None:
            scored.append(await self._score(batch, trace))

        async def generate(shard: int, group: asyncio.TaskGroup) -> None:
            shards = len(self._stages.rollout)
            stream = self._stages.rollout.stream("generate", lambda: work.remaining(shard, shards))
            async for answer in stream:
                trace.rollouts.append(answer.header)
                work.received(answer.header)
                if answer.header.keys:
                    waiting.append((answer.header, answer.refs[0]))
                tokens = sum(sum(header.row_tokens) for header, _ in waiting)
                full = tokens >= self._spec.teacher.max_batch_tokens
                if waiting and (full or work.complete):
                    group.create_task(score(waiting.copy()))
                    waiting.clear()

        waiting: list[tuple[RolloutHeader, Any]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for shard in range(len(self._stages.rollout)):
                    group.create_task(generate(shard, group))
        except BaseExceptionGroup as errors:
            raise first_leaf(errors) from errors
        if not work.complete:
            raise RunFailedError(f"step {work.step}: the rollout pool lost rollouts; a bug")
        for batch in scored:
            work.quarantine(batch.header.quarantined)
        trace.quarantined = len(work.quarantined)
        return scored

    async def _score(self, batch: list[tuple[RolloutHeader, Any]], trace: StepTrace) -> _Scored:
        """ROLLOUTS -> SCORES and TARGETS, which stay where the teacher made them."""
        rollouts = tuple(ref for _, ref in batch)
        answer = await self._stages.teacher.call("score", *rollouts, returns=3)
        trace.teachers.append(answer.header)
        scores, targets = answer.refs
        return _Scored(answer.header, rollouts, scores, targets, answer.node_id)

    async def _select(self, work: RolloutWork, scored: list[_Scored], trace: StepTrace) -> Any:
        """SCORES of the whole step -> KEEP: the step's barrier.

        Steps after the first wait until step 1 has frozen its quadrant thresholds.
        """
        if work.step > 1:
            await self._first_selected.wait()
        answer = await self._stages.selector.call(
            "select",
            work.row_tokens,
            work.rewards,
            self.frozen,
            *(batch.scores for batch in scored),
            returns=2,
        )
        trace.selection = answer.header
        if answer.header.kept_tokens and answer.header.weight_sum == 0:
            reason = "rewards leave every rollout without weight"
            self._journal.event("update_skipped", step=work.step, reason=reason)
        self.frozen = answer.header.frozen_thresholds
        self._first_selected.set()
        return answer.refs[0]

    async def _cut_all(
        self, work: RolloutWork, scored: list[_Scored], keep: Any, trace: StepTrace
    ) -> Prepared:
        """TARGETS + KEEP -> SELECTED, each batch on the node where its TARGETS lie."""
        assert trace.selection is not None
        rank_of = trace.selection.rank_of
        ranks = [sorted({rank_of[key] for key in one.header.keys} - {-1}) for one in scored]
        room = {batch.node_id: asyncio.Semaphore(_CUTS_AT_ONCE) for batch in scored}

        async def cut_one(batch: _Scored, own: list[int]) -> tuple[CutHeader, list[Any]]:
            async with room[batch.node_id]:
                return await self._cut_one(keep, batch, own)

        cuts = await together(*map(cut_one, scored, ranks))
        trace.cuts = [header for header, _ in cuts]
        selected: list[list[Any]] = [[] for _ in range(len(self._stages.learner))]
        for own, (_, refs) in zip(ranks, cuts, strict=True):
            for rank, ref in zip(own, refs[1:], strict=True):
                selected[rank].append(ref)
        return Prepared(
            step=work.step,
            selected=selected,
            samples=[refs[0] for _, refs in cuts],
            quarantined=work.quarantined,
            cursor=work.cursor,
            trace=trace,
        )

    async def _cut_one(
        self, keep: Any, batch: _Scored, ranks: list[int]
    ) -> tuple[CutHeader, list[Any]]:
        """The header, and references of SAMPLES and of SELECTED for each of `ranks`.

        One whose process dies or hangs is tried again.
        """
        remote = self._cut.options(
            num_returns=2 + len(ranks),
            scheduling_strategy=NodeAffinitySchedulingStrategy(batch.node_id, soft=True),
        )
        sampled_only = self._spec.loss.kind == "policy_gradient"
        for _ in range(self._spec.faults.max_tries):
            refs = remote.remote(
                ranks, keep, batch.scores, batch.targets, *batch.rollouts, sampled_only=sampled_only
            )
            try:
                header = await within(self._spec.faults.item_timeout_s, value_of(refs[0]))
                return header, refs[1:]
            except FAILURES as error:
                failure = classify(error, "cut")
                if not isinstance(failure, ReplicaError):
                    raise failure from error
                ray.cancel(refs[0], force=True)
        raise RunFailedError(f"cut failed {self._spec.faults.max_tries} times, last: {failure}")

    def _refuse_too_many(self, work: RolloutWork) -> None:
        """Quarantine is for the odd poisonous prompt: past a fraction the run fails."""
        quarantined: list[Quarantined] = work.quarantined
        self._journal.quarantine(quarantined)
        share = len(quarantined) / work.rows
        if share > self._spec.faults.max_quarantined_fraction or len(quarantined) == work.rows:
            raise RunFailedError(
                f"step {work.step}: {len(quarantined)} of {work.rows} rollouts quarantined, more "
                f"than faults.max_quarantined_fraction; first: {quarantined[0].reason}"
            )
