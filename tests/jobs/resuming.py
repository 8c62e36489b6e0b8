"""Runs that are broken off and gone on with on warm pools, and their directories file by file."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.jobs.harness import Crew, _ignore
from tip_ray.contract.errors import RunCancelledError
from tip_ray.contract.run_state import RunState, StepMetrics
from tip_ray.contract.spec import RunSpec
from tip_ray.control.audit import check_audit
from tip_ray.control.crew import Stages, make_stages
from tip_ray.control.journal import Journal
from tip_ray.control.lease import begin, take_over
from tip_ray.control.placement import demand
from tip_ray.control.preflight import preflight
from tip_ray.control.progress import SilentProgress
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import load_spec
from tip_ray.control.train import train
from tip_ray.runtime.cluster import reserve

# What a clock or the machine says, not the run.
VOLATILE = {"time", "learner_tokens_per_s", "learner_peak_bytes"}
VOLATILE |= {name for name in StepMetrics.model_fields if name.startswith("seconds_")}


class CrashedError(Exception):
    """The driver is gone in the middle of a step, without a word."""


class CrashingAfter(SilentProgress):
    """Crashes once the metrics of `step` are written, and before its checkpoint."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, metrics: StepMetrics, *_: Any) -> None:
        if metrics.step == self._step:
            raise CrashedError


def drive(
    crew: Crew,
    spec: RunSpec,
    run_id: str,
    *,
    progress: SilentProgress | None = None,
    cancel: bool = False,
) -> RunReader:
    """What the driver does, on the pools of `crew`: begin or go on, train, export.

    Args:
        cancel: somebody asks for it as soon as the run has begun.
    """
    return crew.loop.run(_drive(crew.stages, spec, run_id, progress or SilentProgress(), cancel))


async def _drive(
    stages: Stages, spec: RunSpec, run_id: str, progress: SilentProgress, cancel: bool
) -> RunReader:
    await _rejoin(stages.learner)
    checked = preflight(spec)
    lease = take_over(spec, run_id) or begin(spec, run_id)
    lease.claim(spec)
    if cancel:
        lease.directory.request_cancel()
    first = spec.evaluation[0].name if spec.evaluation else None
    journal = Journal(lease.directory, lease.status, progress, checked.tokenizer, first)
    await journal.state(RunState.STARTING)
    await journal.state(RunState.RUNNING)
    try:
        await train(spec, checked, journal, stages)
    except RunCancelledError as error:
        journal.end(RunState.CANCELLED, str(error))
        raise
    except CrashedError:
        journal._writer.shutdown(wait=True)
        raise
    url = f"{lease.directory.url}/export"
    await stages.learner.call_same("export", url, checked.facts.student_path)
    journal.end(RunState.SUCCEEDED)
    return RunReader(lease.directory.url)


async def _rejoin(learner: Any) -> None:
    """Ranks that have trained nothing, in the processes that are there."""
    await learner.call_same("close")
    first = learner._actors[0]
    host, port = await first.node_address.remote(), await first.open_port.remote()
    await learner.call_same("join", host, port, len(learner))


def with_another_learner(crew: Crew, spec: RunSpec) -> Crew:
    """The crew, its learner and selector replaced by those of `spec`."""

    async def go() -> Crew:
        groups = await reserve({"learner": demand(spec)["learner"]}, timeout_s=60)
        facts = preflight(spec).facts
        made = make_stages(spec, facts, {**crew.groups, **groups}, _ignore)
        await made.selector.start()
        await made.learner.start()
        stages = replace(crew.stages, selector=made.selector, learner=made.learner)
        return Crew(stages, groups, crew.loop)

    return crew.loop.run(go())


def tree(place: Path) -> dict[str, str]:
    """Every file under `place`, by name inside it, with its digest."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def metrics_of(reader: RunReader) -> list[dict[str, Any]]:
    """Rows of metrics without what a clock or the machine says."""
    rows = reader.read_metrics().to_pylist()
    return [{name: row[name] for name in row if name not in VOLATILE} for row in rows]


def assert_same_run(one: RunReader, other: RunReader) -> None:
    """Both directories tell the same, file by file, but for times."""
    here, there = (Path(reader.url) for reader in (one, other))
    assert (here / "spec.yaml").read_bytes() == (there / "spec.yaml").read_bytes()
    for part in ("export", "checkpoints", "samples"):
        found = tree(here / part)
        assert found, part
        assert found == tree(there / part)
    for mine, theirs in zip(metrics_of(one), metrics_of(other), strict=True):
        assert mine == theirs
    evaluations = [
        [result.model_dump(exclude={"seconds"}) for result in reader.read_evaluations()]
        for reader in (one, other)
    ]
    assert evaluations[0] == evaluations[1]
    told = {"state", "step", "steps", "loss", "accuracy", "initial_accuracy", "kept_fraction"}
    told |= {"tokens_generated", "tokens_kept", "bytes_shipped", "bytes_unpruned"}
    told |= {"weight_version", "updates_skipped", "rollouts_quarantined", "error"}
    assert one.read_status().model_dump(include=told) == other.read_status().model_dump(
        include=told
    )
    for reader in (one, other):
        assert check_audit(reader, load_spec(f"{reader.url}/spec.yaml")).exactly_once
