"""The loop. Read this file first.

    prompts -> rollout pool -> teacher pool =SCORES=> selector =KEEP=> cut -> learner ranks
                  ^                                                              |
                  +------------------------ weights (version + 1) --------------+

Two loops share one number: `max_lag + 1` slots. `_admit_loop` takes a slot to start a step,
`_learn_loop` gives it back when every live rollout replica has adopted the step's weights. So no
rollout is made with weights more than `max_lag` steps behind, at most `max_lag + 1` steps are in
memory, and `max_lag: 0` is strictly on-policy with no code of its own. Stale work is bounded by
admission, never thrown away.

The driver holds headers and references; token tables pass from actor to actor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tip_ray.contract.errors import (
    LeaseLostError,
    ObjectsLostError,
    ReplicaError,
    RunCancelledError,
    RunDirectoryError,
    RunFailedError,
)
from tip_ray.contract.headers import (
    CutHeader,
    LearnerReport,
    QuadrantThresholds,
    Quarantined,
    RolloutHeader,
    TeacherHeader,
)
from tip_ray.contract.spec import RunSpec
from tip_ray.control.audit import step_audit
from tip_ray.control.checkpoint import Checkpoints, Manifest
from tip_ray.control.evaluate import Evaluator
from tip_ray.control.journal import PAUSES_S, Journal
from tip_ray.control.step_metrics import StepTrace, step_metrics
from tip_ray.control.step_work import RolloutWork
from tip_ray.runtime.gang import Gang
from tip_ray.runtime.pool import FAILURES, Pool
from tip_ray.runtime.replica import classify
from tip_ray.runtime.tasks import first_leaf, together, value_of
from tip_ray.runtime.weights import WeightVersion
from tip_ray.stages.cut import cut
from tip_ray.stages.prompts import Cursor, PromptSource


@dataclass(frozen=True)
class Stages:
    """The pools of a run, started."""

    rollout: Pool
    teacher: Pool
    selector: Pool
    learner: Gang


@dataclass(frozen=True)
class _Scored:
    """One teacher batch: references, and where the heavy half lies."""

    header: TeacherHeader
    rollouts: tuple[Any, ...]
    scores: Any
    targets: Any
    node_id: str


@dataclass(frozen=True)
class _Prepared:
    """A step that waits for the learner."""

    step: int
    selected: list[list[Any]]  # by rank, references of SELECTED tables
    samples: list[Any]  # references of SAMPLES tables
    quarantined: list[Quarantined]
    cursor: Cursor  # where the next step's prompts begin
    trace: StepTrace


class Pipeline:
    """One run's loop over ready pools.

    Args:
        frozen: quadrant thresholds of step 1, where a resumed run has them.
    """

    def __init__(
        self,
        spec: RunSpec,
        stages: Stages,
        source: PromptSource,
        evaluator: Evaluator,
        journal: Journal,
        checkpoints: Checkpoints,
        frozen: QuadrantThresholds | None = None,
    ) -> None:
        self._spec, self._stages, self._source = spec, stages, source
        self._evaluator, self._journal = evaluator, journal
        self._checkpoints = checkpoints
        self._frozen = frozen
        self._slots = asyncio.Semaphore(spec.max_lag + 1)
        self._first_selected = asyncio.Event()
        self._skipped_in_a_row = 0
        self._cut = ray.remote(num_cpus=0)(cut)

    async def run(self, first_step: int = 1) -> None:
        """Train steps `first_step` to `spec.steps`, evaluating before, in between and after.

        Raises:
            RunCancelledError: asked to stop; the step in progress was finished and saved.
            RunFailedError: a pool or the data gave out.
            ReplicaError: a learner rank is lost, and with it the others' state.
            ObjectsLostError: weights went with the learner's node.
        """
        if first_step == 1:
            await self._evaluate(0)
        if self._frozen is not None:
            self._first_selected.set()
        queue: asyncio.Queue[asyncio.Task[_Prepared]] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._admit_loop(first_step, queue, group))
                group.create_task(self._learn_loop(first_step, queue))
        except BaseExceptionGroup as errors:
            raise first_leaf(errors) from errors

    async def _admit_loop(
        self, first_step: int, queue: asyncio.Queue[asyncio.Task[_Prepared]], group: Any
    ) -> None:
        """Consumes prompts, produces steps under way.

        Waits for a slot; unblocked by `_learn_loop`, which frees one a trained step.
        """
        for step in range(first_step, self._spec.steps + 1):
            await self._slots.acquire()
            prompts = self._source.take(step, self._spec.prompts.prompts_per_step)
            work = RolloutWork(step, prompts, self._source.cursor)
            queue.put_nowait(group.create_task(self._prepare(work)))

    async def _learn_loop(
        self, first_step: int, queue: asyncio.Queue[asyncio.Task[_Prepared]]
    ) -> None:
        """Consumes prepared steps in order, produces weight versions, metrics and samples.

        Waits for the next step's tokens; unblocked by its `_prepare`.
        """
        ended = time.monotonic()
        for _ in range(first_step, self._spec.steps + 1):
            prepared = await (await queue.get())
            trace = prepared.trace
            trace.seconds_learner_waiting = time.monotonic() - ended
            trace.reports = await self._train(prepared)
            await self._publish(prepared.step, trace)
            await self._evaluate(prepared.step, trace)
            now = time.monotonic()
            trace.seconds_step, ended = now - ended, now
            metrics = step_metrics(trace)
            audit = self._audit(prepared)
            await self._journal.step(metrics, await self._samples(prepared), audit)
            await self._checkpoint_or_stop(prepared)
            self._slots.release()

    async def _prepare(self, work: RolloutWork) -> _Prepared:
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

    async def _prepare_once(self, work: RolloutWork) -> _Prepared:
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
        began = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for shard in range(len(self._stages.rollout)):
                    group.create_task(generate(shard, group))
        except BaseExceptionGroup as errors:
            raise first_leaf(errors) from errors
        trace.seconds_generate_and_score = time.monotonic() - began
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
            self._frozen,
            *(batch.scores for batch in scored),
            returns=2,
        )
        trace.selection = answer.header
        if answer.header.kept_tokens and answer.header.weight_sum == 0:
            reason = "rewards leave every rollout without weight"
            self._journal.event("update_skipped", step=work.step, reason=reason)
        self._frozen = answer.header.frozen_thresholds
        self._first_selected.set()
        return answer.refs[0]

    async def _cut_all(
        self, work: RolloutWork, scored: list[_Scored], keep: Any, trace: StepTrace
    ) -> _Prepared:
        """TARGETS + KEEP -> SELECTED, each batch on the node where its TARGETS lie."""
        cuts = await together(*(self._cut_one(keep, batch) for batch in scored))
        trace.cuts = [header for header, _ in cuts]
        ranks = range(len(self._stages.learner))
        return _Prepared(
            step=work.step,
            selected=[[refs[1 + rank] for _, refs in cuts] for rank in ranks],
            samples=[refs[0] for _, refs in cuts],
            quarantined=work.quarantined,
            cursor=work.cursor,
            trace=trace,
        )

    async def _cut_one(self, keep: Any, batch: _Scored) -> tuple[CutHeader, list[Any]]:
        """The header, and references of SAMPLES and of each rank's SELECTED.

        Ray itself tries again where the process dies; here is the deadline of one that hangs.
        """
        ranks = len(self._stages.learner)
        remote = self._cut.options(
            num_returns=2 + ranks,
            scheduling_strategy=NodeAffinitySchedulingStrategy(batch.node_id, soft=True),
        )
        sampled_only = self._spec.loss.kind == "policy_gradient"
        for _ in range(self._spec.faults.max_tries):
            refs = remote.remote(
                ranks, keep, batch.scores, batch.targets, *batch.rollouts, sampled_only=sampled_only
            )
            try:
                waited = asyncio.wait_for(value_of(refs[0]), self._spec.faults.item_timeout_s)
                return await waited, refs[1:]
            except FAILURES as error:
                failure = classify(error, "cut")
                if not isinstance(failure, ReplicaError):
                    raise failure from error
                ray.cancel(refs[0], force=True)
        raise RunFailedError(f"cut failed {self._spec.faults.max_tries} times, last: {failure}")

    def _audit(self, prepared: _Prepared) -> pa.Table:
        trace = prepared.trace
        assert trace.selection is not None
        return step_audit(
            prepared.step,
            self._journal.status.epoch,
            trace.reports,
            trace.selection.nothing_kept,
            prepared.quarantined,
        )

    async def _samples(self, prepared: _Prepared) -> list[pa.Table]:
        """They are for show: where a node took them along, the step has none."""
        try:
            return await together(*map(value_of, prepared.samples))
        except RayError as error:
            self._journal.event("samples_lost", step=prepared.step, reason=type(error).__name__)
            return []

    async def _train(self, prepared: _Prepared) -> list[LearnerReport]:
        """SELECTED -> one update on all ranks; too many skipped in a row fail the run."""
        args = [(prepared.step, *own) for own in prepared.selected]
        reports: list[LearnerReport] = await self._stages.learner.call("train_step", args)
        skipped = reports[0].skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self._journal.event("update_skipped", step=prepared.step, loss=reports[0].loss)
        if self._skipped_in_a_row >= self._spec.faults.max_skipped_updates:
            raise RunFailedError(
                f"step {prepared.step}: {self._skipped_in_a_row} updates in a row had a "
                f"non-finite loss or gradient; lower learner.lr or look at samples/"
            )
        return reports

    async def _publish(self, step: int, trace: StepTrace) -> None:
        began = time.monotonic()
        trace.weights = await publish(self._stages, step)
        trace.seconds_publish = time.monotonic() - began

    async def _evaluate(self, step: int, trace: StepTrace | None = None) -> None:
        """Evaluations that are due; every replica holds version `step`, and keeps it meanwhile."""
        began = time.monotonic()
        for result in await self._evaluator.run_due(step):
            await self._journal.evaluation(result)
        if trace is not None:
            trace.seconds_evaluation = time.monotonic() - began

    async def _checkpoint_or_stop(self, prepared: _Prepared) -> None:
        """A checkpoint every few steps, after the last, and before the run stops as asked.

        It comes last in its step: what it says is trained has its metrics and samples on disk.
        """
        step, last = prepared.step, prepared.step == self._spec.steps
        asked = not last and await self._journal.cancel_requested()
        if asked or last or step % self._spec.checkpoint.every_steps == 0:
            await self._save(prepared)
        if asked:
            raise RunCancelledError(f"cancelled after step {step}, as was asked")

    async def _save(self, prepared: _Prepared) -> None:
        assert self._frozen is not None
        began, step = time.monotonic(), prepared.step
        manifest = partial(
            Manifest,
            step=step,
            weight_version=step,
            seed=self._spec.seed,
            cursor=prepared.cursor,
            frozen_thresholds=self._frozen,
        )
        await self._save_with_patience(manifest, step)
        self._journal.event("checkpoint", step=step, seconds=time.monotonic() - began)

    async def _save_with_patience(self, manifest: Callable[..., Manifest], step: int) -> None:
        """Storage that fails for a moment costs nothing; for longer, it ends the run."""
        for pause_s in (*PAUSES_S, None):
            try:
                await self._checkpoints.save(self._stages.learner, manifest, step)
                return
            except LeaseLostError:
                raise
            except RunDirectoryError as error:
                if pause_s is None:
                    raise RunFailedError(
                        f"checkpoint after step {step}: {error}; once it can be written, the "
                        f"same --run-id goes on"
                    ) from error
                await asyncio.sleep(pause_s)

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


async def publish(stages: Stages, step: int) -> WeightVersion:
    """The learner's weights after `step` -> every rollout replica, each when its engine is empty.

    Raises:
        ReplicaError: a learner rank died.
    """
    groups = await stages.learner.stream("publish", step)
    version = WeightVersion(
        version=step,
        group_refs=tuple(ref for _, ref in groups),
        nbytes=sum(nbytes for nbytes, _ in groups),
    )
    await stages.rollout.adopt(version)
    return version
