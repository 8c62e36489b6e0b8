"""A run's parts in this process, so that several pipelines can share warm pools."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tip_ray.contract.run_state import RunState
from tip_ray.contract.spec import RunSpec
from tip_ray.control.crew import Stages, close_stages, make_stages, start_stages
from tip_ray.control.journal import Journal
from tip_ray.control.lease import begin
from tip_ray.control.placement import demand
from tip_ray.control.preflight import preflight
from tip_ray.control.progress import SilentProgress
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import load_spec
from tip_ray.control.train import train
from tip_ray.runtime.cluster import release, reserve
from tip_ray.runtime.weights import WeightVersion

QUICKSTART = Path(__file__).parents[2] / "job_specs" / "quickstart.yaml"


def quickstart(**overrides: Any) -> RunSpec:
    """The quickstart's spec; a dot in a path is written as two underscores."""
    return load_spec(
        QUICKSTART, {key.replace("__", "."): value for key, value in overrides.items()}
    )


@dataclass
class Crew:
    """Warm pools of one spec; `train` may be called for specs that fit them."""

    stages: Stages
    groups: Mapping[str, Any]
    loop: asyncio.Runner

    @classmethod
    def start(cls, spec: RunSpec) -> Crew:
        loop = asyncio.Runner()

        async def go() -> tuple[Stages, Mapping[str, Any]]:
            groups = await reserve(demand(spec), timeout_s=60)
            stages = make_stages(spec, preflight(spec).facts, groups, _ignore)
            await start_stages(stages)
            return stages, groups

        stages, groups = loop.run(go())
        return cls(stages, groups, loop)

    def train(self, spec: RunSpec, run_root: Path, run_id: str) -> RunReader:
        """One run from the initial student on; its directory's reader."""
        return self.loop.run(self._train(spec, run_root, run_id))

    async def _train(self, spec: RunSpec, run_root: Path, run_id: str) -> RunReader:
        await self._reset()
        checked = preflight(spec)
        lease = begin(spec.model_copy(update={"run_root": str(run_root)}), run_id)
        first = spec.evaluation[0].name if spec.evaluation else None
        journal = Journal(lease.directory, lease.status, SilentProgress(), checked.tokenizer, first)
        await journal.state(RunState.STARTING)
        await journal.state(RunState.RUNNING)
        try:
            await train(spec, checked, journal, self.stages)
        finally:
            journal.end(RunState.SUCCEEDED)
        return RunReader(lease.directory.url)

    async def _reset(self) -> None:
        """A learner that has trained nothing, and its weights in the rollout replicas."""
        self.stages.learner.close()
        await self.stages.learner.start()
        groups = await self.stages.learner.stream("publish", 0)
        refs = tuple(ref for _, ref in groups)
        await self.stages.rollout.adopt(WeightVersion(0, refs, sum(size for size, _ in groups)))

    def close(self) -> None:
        close_stages(self.stages)
        release(self.groups)
        self.loop.close()


def _ignore(kind: str, **facts: Any) -> None:
    """Faults show as failures of the test itself."""
