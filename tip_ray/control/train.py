"""From the newest good checkpoint to the last step, however often the learner is lost between."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from tip_ray.contract.errors import ObjectsLostError, ReplicaError, RunFailedError, SpecError
from tip_ray.contract.headers import QuadrantThresholds
from tip_ray.contract.spec import RunSpec
from tip_ray.control.checkpoint import Checkpoints, Manifest
from tip_ray.control.crew import Stages
from tip_ray.control.evaluate import Evaluator
from tip_ray.control.journal import Journal
from tip_ray.control.pipeline import Pipeline, publish
from tip_ray.control.preflight import Preflight
from tip_ray.stages.prompts import Cursor, PromptSource


@dataclass(frozen=True)
class _Start:
    """Where training goes on."""

    step: int  # the last one trained; 0: the initial student
    cursor: Cursor
    frozen: QuadrantThresholds | None


async def train(spec: RunSpec, checked: Preflight, journal: Journal, stages: Stages) -> None:
    """Train to the last step.

    A learner rank that is lost takes its gang with it: the gang starts again from the newest good
    checkpoint and the steps since then are made again, from the same prompts and seeds. The other
    pools stay. A resumed run comes in by the same way.

    Raises:
        RunFailedError: the learner was lost more than `faults.max_learner_restarts` times, or a
            pool or the data gave out.
        RunCancelledError: as was asked.
    """
    first = _Start(0, checked.source.cursor, None)
    evaluator = Evaluator(stages.rollout, spec.evaluation, checked.problems, spec.steps)
    checkpoints = Checkpoints(journal.directory.storage, spec.checkpoint.keep)
    lost_at: float | None = None
    for restarts in range(spec.faults.max_learner_restarts + 1):
        try:
            if restarts:
                await stages.learner.start()
            start = await _restore(first, journal, stages, checked.source, checkpoints)
            if lost_at is not None:
                seconds = time.monotonic() - lost_at
                journal.event("replica_recovered", pool="learner", replica="all", seconds=seconds)
                lost_at = None
            pipeline = Pipeline(
                spec, stages, checked.source, evaluator, journal, checkpoints, start.frozen
            )
            await pipeline.run(start.step + 1)
            return
        except (ReplicaError, ObjectsLostError) as error:
            if restarts == spec.faults.max_learner_restarts:
                raise RunFailedError(
                    f"faults.max_learner_restarts: the learner was lost {restarts + 1} times, "
                    f"last: {error}"
                ) from error
            if lost_at is None:  # else it was lost again before it had recovered
                lost_at = time.monotonic()
                journal.event("replica_lost", pool="learner", replica="all", reason=str(error))
            stages.learner.close()


async def _restore(
    first: _Start,
    journal: Journal,
    stages: Stages,
    source: PromptSource,
    checkpoints: Checkpoints,
) -> _Start:
    """Bring learner, rollout replicas, prompts and run directory to one point of the history."""
    warnings: list[str] = []
    await asyncio.to_thread(checkpoints.clear_unfinished)
    manifest = await asyncio.to_thread(checkpoints.newest, warnings.append)
    for line in warnings:
        journal.warn("checkpoint_skipped", line)
    start = first if manifest is None else _after(manifest)
    if manifest is not None:
        _refuse_fewer_steps(journal.status.steps, manifest.step)
        names = [file.name for file in manifest.files]
        await stages.learner.call_same("load", checkpoints.url(manifest.step), names)
    if start.step or any(stages.rollout.weight_versions):
        await publish(stages, start.step)
    source.seek(start.cursor)
    await journal.rewind(start.step)
    return start


def _refuse_fewer_steps(steps: int, trained: int) -> None:
    if steps < trained:
        expected = f"at least {trained}: so many are trained"
        cure = "raise it, or `tip-ray export` a step that is kept"
        raise SpecError("steps", str(steps), expected, cure)


def _after(manifest: Manifest) -> _Start:
    return _Start(manifest.step, manifest.cursor, manifest.frozen_thresholds)
