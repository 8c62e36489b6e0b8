"""The real pipeline over stages that sleep: one run, and what a step of it cost.

Real are Pipeline, Preparation, Pool, Gang, SelectorActor, cut, PromptSource, Journal and all tables
with their checks. In the place of models are `scale_stages`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import psutil

from tests.benchmarks.scale_stages import (
    MIN_ROWS,
    VOCAB,
    Load,
    Made,
    SleepingLearner,
    SleepingRollout,
    SleepingTeacher,
    sleeping,
)
from tip_ray.contract import tables
from tip_ray.contract.run_state import RunState, StepMetrics
from tip_ray.contract.spec import RunSpec
from tip_ray.control import crew
from tip_ray.control.checkpoint import Checkpoints
from tip_ray.control.crew import Stages, close_stages, make_stages, start_stages
from tip_ray.control.evaluate import Evaluator
from tip_ray.control.journal import Journal
from tip_ray.control.lease import begin
from tip_ray.control.pipeline import Pipeline
from tip_ray.control.placement import demand
from tip_ray.control.progress import SilentProgress
from tip_ray.control.run_reader import RunReader
from tip_ray.demo import checkpoint_path
from tip_ray.runtime.cluster import release, reserve
from tip_ray.stages import rollout as rollout_stage
from tip_ray.stages.models import load_tokenizer
from tip_ray.stages.pair_checks import PairFacts
from tip_ray.stages.prompts import PromptSource

SAMPLES_PER_PROMPT = 4
START_S = 900  # hundreds of processes on few cores
STAGES = {
    "RolloutActor": SleepingRollout,
    "TeacherActor": SleepingTeacher,
    "LearnerActor": SleepingLearner,
}


@dataclass(frozen=True)
class Shape:
    """What tables are made of. `width` is d with targets hidden, else K."""

    targets: tables.Targets
    k: int
    width: int


@dataclass(frozen=True)
class Mark:
    """Clocks at the end of a step, in seconds."""

    at: float
    driver_cpu: float  # all threads
    loop_cpu: float  # the thread that runs the event loop
    system_cpu: float  # raylets and GCS
    machine_cpu: float  # of all processes
    metrics: StepMetrics


class Marks(SilentProgress):
    """Told of every step by the journal."""

    def __init__(self, system: Sequence[psutil.Process] = ()) -> None:
        self.marks: list[Mark] = []
        self._system = system

    def step(self, metrics: StepMetrics, *_: object) -> None:
        machine = psutil.cpu_times()
        busy = sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
        mark = Mark(
            at=time.time(),
            driver_cpu=time.process_time(),
            loop_cpu=time.thread_time(),
            system_cpu=sum(sum(one.cpu_times()[:2]) for one in self._system),
            machine_cpu=busy,
            metrics=metrics,
        )
        self.marks.append(mark)


@dataclass(frozen=True)
class Replicas:
    """Of each pool."""

    rollout: int
    teacher: int
    learner: int


def spec_of(shape: Shape, replicas: Replicas, *, placed: bool) -> RunSpec:
    """The run's spec; `placed`: each pool on nodes of its own, by their custom resources."""
    pools: dict[str, dict[str, Any]] = {
        name: {"replicas": count, "resources": {name: 1.0} if placed else {}}
        for name, count in asdict(replicas).items()
    }
    pools["teacher"] |= {"model": "demo:carry-teacher", "targets": shape.targets}
    pools["teacher"] |= {"max_batch_tokens": 1}  # as with long rows: every table is a batch
    pools["rollout"] |= {"samples_per_prompt": SAMPLES_PER_PROMPT, "max_response_tokens": 1 << 13}
    return RunSpec(
        name="scale",
        steps=1,
        student={"model": "demo:carry-student"},
        support={"k": shape.k},
        prompts={"source": "demo:carry"},
        checkpoint={"every_steps": 1 << 20},
        faults={"item_timeout_s": START_S},
        **pools,
    )


@dataclass
class Crew:
    """Warm pools of sleeping stages; `run` may be called for several loads."""

    spec: RunSpec
    made: Made
    stages: Stages
    groups: Mapping[str, Any]
    loop: asyncio.Runner
    events: list[str]  # kinds of faults; a run that has any measures something else

    @classmethod
    def start(cls, spec: RunSpec, shape: Shape, made: Made) -> Crew:
        assert rollout_stage.MIN_ROWS == MIN_ROWS
        path = str(checkpoint_path("carry-student"))
        facts = PairFacts(path, path, VOCAB, shape.k, shape.width, (0,), 0, False)
        loop, events = asyncio.Runner(), list[str]()

        def on_event(kind: str, **facts: Any) -> None:
            events.append(f"{kind} {facts}")

        async def go() -> tuple[Stages, Mapping[str, Any]]:
            groups = await reserve(demand(spec), timeout_s=START_S)
            fakes = {name: sleeping(stage, made) for name, stage in STAGES.items()}
            with mock.patch.multiple(crew, **fakes):
                stages = make_stages(spec, facts, groups, on_event)
            await start_stages(stages)
            return stages, groups

        stages, groups = loop.run(go())
        return cls(spec, made, stages, groups, loop, events)

    def run(
        self, load: Load, *, steps: int, max_lag: int, marks: Marks | None = None
    ) -> tuple[list[Mark], RunReader]:
        """`steps` steps of `load`: the clocks at the end of each, and the run's directory."""
        load.put(self.made.directory)
        prompts = self.spec.prompts.model_copy(
            update={"prompts_per_step": load.rows // SAMPLES_PER_PROMPT}
        )
        update = {"steps": steps, "max_lag": max_lag, "prompts": prompts}
        spec = self.spec.model_copy(
            update=update | {"run_root": tempfile.mkdtemp(dir=self.made.directory)}
        )
        return self.loop.run(self._run(spec, marks or Marks()))

    async def _run(self, spec: RunSpec, marks: Marks) -> tuple[list[Mark], RunReader]:
        tokenizer = load_tokenizer(str(checkpoint_path("carry-student")))
        source = PromptSource(
            spec.prompts,
            max_prompt_tokens=spec.rollout.max_prompt_tokens,
            samples_per_prompt=SAMPLES_PER_PROMPT,
            seed=spec.seed,
            tokenizer=tokenizer,
        )
        lease = begin(spec, "scale")
        journal = Journal(lease.directory, lease.status, marks, tokenizer, None)
        await journal.state(RunState.STARTING)
        await journal.state(RunState.RUNNING)
        evaluator = Evaluator(self.stages.rollout, (), {}, spec.steps)
        checkpoints = Checkpoints(journal.directory.storage, spec.checkpoint.keep)
        pipeline = Pipeline(spec, self.stages, source, evaluator, journal, checkpoints)
        await pipeline.run()
        journal.end(RunState.SUCCEEDED)
        return marks.marks, RunReader(lease.directory.url)

    def close(self) -> None:
        close_stages(self.stages)
        release(self.groups)
        self.loop.close()


def critical_path_s(load: Load, replicas: Replicas) -> float:
    """Seconds of a strictly on-policy step whose stages do nothing but sleep.

    Each rollout replica hands on a table as its rows are done, the next free teacher replica takes
    it, and the learner ranks, between which the rows are shared out, wait for the last one.
    """
    free = [0.0] * replicas.teacher
    heapq.heapify(free)
    last = 0.0
    for ready, rows in sorted(_tables_of_rollouts(load, replicas.rollout)):
        last = max(heapq.heappop(free), ready) + load.teacher_s * rows / load.rows
        heapq.heappush(free, last)
    return max(free) + load.learner_s * -(-load.rows // replicas.learner) / load.rows


def _tables_of_rollouts(load: Load, replicas: int) -> list[tuple[float, int]]:
    """(second at which it is there, rows) of each table of a step."""
    made = []
    for shard in range(replicas):
        own = load.rows // replicas + (shard < load.rows % replicas)
        for start in range(0, own, MIN_ROWS):
            rows = min(MIN_ROWS, own - start)
            made.append((load.rollout_s * (start + rows) / load.rows, rows))
    return made


def tables_a_step(load: Load, replicas: Replicas) -> int:
    """ROLLOUTS tables of a step; each is more than a teacher batch, so as many of those."""
    return len(_tables_of_rollouts(load, replicas.rollout))


def figures(marks: Sequence[Mark], load: Load, replicas: Replicas) -> dict[str, Any]:
    """Means over all steps but the first, which warms up."""
    count = len(marks) - 1

    def mean(name: str) -> float:
        return sum(getattr(mark.metrics, name) for mark in marks[1:]) / count

    def clock(name: str) -> float:
        first, last = getattr(marks[0], name), getattr(marks[-1], name)
        return float(last - first) / count

    step_s, ideal_s = clock("at"), critical_path_s(load, replicas)
    named = {
        "rollout -> teacher": "bytes_rollout_to_teacher",
        "teacher -> selector": "bytes_teacher_to_selector",
        "selector -> cut": "bytes_selector_to_cut",
        "cut -> learner": "bytes_cut_to_learner",
        "unpruned -> learner": "bytes_unpruned_to_learner",
        "weights": "bytes_weight_sync",
    }
    return {
        "replicas": asdict(replicas),
        "tables": tables_a_step(load, replicas),
        "step_s": step_s,
        "steps_s": [b.at - a.at for a, b in itertools.pairwise(marks)],
        "ideal_s": ideal_s,
        "overhead_s": step_s - ideal_s,
        "selector_s": mean("seconds_selector"),
        "cut_s": mean("seconds_cut"),
        "publish_s": mean("seconds_publish"),
        "driver_cpu_s": clock("driver_cpu"),
        "loop_cpu_s": clock("loop_cpu"),
        "system_cpu_s": clock("system_cpu"),
        "machine_cpu_s": clock("machine_cpu"),
        "hops_bytes": {hop: mean(name) for hop, name in named.items()},
    }


def with_rows(load: Load, rows: int) -> Load:
    """The same work for each row."""
    share = rows / load.rows
    return replace(
        load,
        rows=rows,
        rollout_s=load.rollout_s * share,
        teacher_s=load.teacher_s * share,
        learner_s=load.learner_s * share,
    )
