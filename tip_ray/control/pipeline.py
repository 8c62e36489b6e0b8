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
from functools import partial
from typing import Any

import pyarrow as pa
from ray.exceptions import RayError

from tip_ray.contract.errors import (
    LeaseLostError,
    RunCancelledError,
    RunDirectoryError,
    RunFailedError,
)
from tip_ray.contract.headers import LearnerReport, QuadrantThresholds
from tip_ray.contract.spec import RunSpec
from tip_ray.control.audit import step_audit
from tip_ray.control.checkpoint import Checkpoints, Manifest
from tip_ray.control.crew import Stages
from tip_ray.control.evaluate import Evaluator
from tip_ray.control.journal import PAUSES_S, Journal
from tip_ray.control.preparation import Preparation, Prepared
from tip_ray.control.step_metrics import StepTrace, step_metrics
from tip_ray.control.step_work import RolloutWork
from tip_ray.runtime.tasks import first_leaf, together, value_of
from tip_ray.runtime.weights import WeightVersion
from tip_ray.stages.prompts import PromptSource


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
        self._preparation = Preparation(spec, stages, journal, frozen)
        self._slots = asyncio.Semaphore(spec.max_lag + 1)
        self._skipped_in_a_row = 0

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
        queue: asyncio.Queue[asyncio.Task[Prepared]] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._admit_loop(first_step, queue, group))
                group.create_task(self._learn_loop(first_step, queue))
        except BaseExceptionGroup as errors:
            raise first_leaf(errors) from errors

    async def _admit_loop(
        self, first_step: int, queue: asyncio.Queue[asyncio.Task[Prepared]], group: Any
    ) -> None:
        """Consumes prompts, produces steps under way.

        Waits for a slot; unblocked by `_learn_loop`, which frees one a trained step.
        """
        for step in range(first_step, self._spec.steps + 1):
            await self._slots.acquire()
            prompts = self._source.take(step, self._spec.prompts.prompts_per_step)
            work = RolloutWork(step, prompts, self._source.cursor)
            queue.put_nowait(group.create_task(self._preparation.run(work)))

    async def _learn_loop(
        self, first_step: int, queue: asyncio.Queue[asyncio.Task[Prepared]]
    ) -> None:
        """Consumes prepared steps in order, produces weight versions, metrics and samples.

        Waits for the next step's tokens; unblocked by its `preparation`.
        """
        ended = time.monotonic()
        for _ in range(first_step, self._spec.steps + 1):
            prepared = await (await queue.get())
            trace = prepared.trace
            trace.seconds_learner_waiting = time.monotonic() - ended
            trace.reports = await self._train(prepared)
            prepared.selected.clear()  # else the stores hold it until the next step is prepared
            await self._publish(prepared.step, trace)
            await self._evaluate(prepared.step, trace)
            now = time.monotonic()
            trace.seconds_step, ended = now - ended, now
            metrics = step_metrics(trace)
            audit = self._audit(prepared)
            await self._journal.step(metrics, await self._samples(prepared), audit)
            await self._checkpoint_or_stop(prepared)
            self._slots.release()

    def _audit(self, prepared: Prepared) -> pa.Table:
        trace = prepared.trace
        assert trace.selection is not None
        return step_audit(
            prepared.step,
            self._journal.status.epoch,
            trace.reports,
            trace.selection.nothing_kept,
            prepared.quarantined,
        )

    async def _samples(self, prepared: Prepared) -> list[pa.Table]:
        """They are for show: where a node took them along, the step has none."""
        try:
            return await together(*map(value_of, prepared.samples))
        except RayError as error:
            self._journal.event("samples_lost", step=prepared.step, reason=type(error).__name__)
            return []

    async def _train(self, prepared: Prepared) -> list[LearnerReport]:
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

    async def _checkpoint_or_stop(self, prepared: Prepared) -> None:
        """A checkpoint every few steps, after the last, and before the run stops as asked.

        It comes last in its step: what it says is trained has its metrics and samples on disk.
        """
        step, last = prepared.step, prepared.step == self._spec.steps
        asked = not last and await self._journal.cancel_requested()
        if asked or last or step % self._spec.checkpoint.every_steps == 0:
            await self._save(prepared)
        if asked:
            raise RunCancelledError(f"cancelled after step {step}, as was asked")

    async def _save(self, prepared: Prepared) -> None:
        frozen = self._preparation.frozen
        assert frozen is not None
        began, step = time.monotonic(), prepared.step
        manifest = partial(
            Manifest,
            step=step,
            weight_version=step,
            seed=self._spec.seed,
            cursor=prepared.cursor,
            frozen_thresholds=frozen,
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
