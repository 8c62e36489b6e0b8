"""Training runs of the selection study: real pools, warm, one crew a seed, all rules on it.

Rules differ in the selector alone, so a crew of one seed serves them all: its selector is replaced
and its learner takes up its first state again. A finished run leaves one JSON part; a part that is
there is not made again, so that the study may be cut into pieces of any length.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.jobs.harness import Crew, quickstart
from tip_ray.contract.spec import RunSpec
from tip_ray.control.crew import make_stages
from tip_ray.control.pipeline import publish
from tip_ray.control.preflight import preflight
from tip_ray.control.run_reader import RunReader


@dataclass(frozen=True)
class Arm:
    """One rule at one retention."""

    rule: str
    retention: float

    @property
    def name(self) -> str:
        return f"{self.rule.replace('_', '-')}-{self.retention:g}".replace(".", "")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; it is written into every part.

    At the quickstart's 128 rollouts a step and 3e-4 every rule is done after four steps. A quarter
    of the rollouts and a fifth of the rate spread that over 30, with a noisier gradient.
    """

    steps: int = 30
    prompts_per_step: int = 8
    samples_per_prompt: int = 4
    lr: float = 6e-5
    schedule: str = "constant"
    evaluate_every: int = 2
    problems: int = 512
    engine: str = "transformers"

    def spec(self, arm: Arm, seed: int) -> RunSpec:
        selection: dict[str, Any] = {"rule": arm.rule}
        if arm.rule != "all":
            selection["retention"] = arm.retention
        entry = {
            "name": "carry",
            "source": "demo:carry-eval",
            "every_steps": self.evaluate_every,
            "limit": self.problems,
        }
        return quickstart(
            seed=seed,
            steps=self.steps,
            max_lag=0,
            student__dtype="float32",
            teacher__dtype="float32",
            rollout__engine=self.engine,
            rollout__samples_per_prompt=self.samples_per_prompt,
            prompts__prompts_per_step=self.prompts_per_step,
            selection=selection,
            learner__lr=self.lr,
            learner__schedule=self.schedule,
            checkpoint__every_steps=self.steps,
            checkpoint__keep=1,
            samples_per_step=0,
            evaluation=[entry],
        )


@dataclass
class StudyCrew(Crew):
    """Warm pools of one seed, for one arm after the other."""

    first_state: dict[str, Any] = field(default_factory=dict)  # where it lies, and its files

    def keep_first_state(self, folder: Path) -> None:
        """Save the learner that has trained nothing."""
        saved = self.loop.run(self.stages.learner.call_same("save", str(folder), 0))
        self.first_state = {"url": str(folder), "names": [file.name for file in saved]}

    def run_arm(self, spec: RunSpec, run_root: Path, run_id: str) -> RunReader:
        """One run of `spec`, which differs from the crew's in its selection only."""
        self.loop.run(self._select_by(spec))
        return self.train(spec, run_root, run_id)

    async def _select_by(self, spec: RunSpec) -> None:
        self.stages.selector.close()
        fresh = make_stages(spec, preflight(spec).facts, self.groups, lambda *_, **__: None)
        self.stages = replace(self.stages, selector=fresh.selector)
        await self.stages.selector.start()

    async def _reset(self) -> None:
        learner = self.stages.learner
        await learner.call_same("load", self.first_state["url"], self.first_state["names"])
        await publish(self.stages, 0)


def make_parts(
    settings: Settings,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    folder: Path,
    run_root: Path,
    limit_s: float,
) -> Iterator[str]:
    """Make the parts that `folder` lacks, seed by seed, a line for each; stop after `limit_s`.

    Run directories lie under `run_root` and are read once.
    """
    began = time.monotonic()
    for seed in seeds:
        missing = [arm for arm in arms if read_part(folder, settings, arm, seed) is None]
        if not missing or time.monotonic() - began > limit_s:
            continue
        crew = StudyCrew.start(settings.spec(missing[0], seed))
        try:
            crew.keep_first_state(run_root / f"first-{seed}")
            for arm in missing:
                if time.monotonic() - began > limit_s:
                    break
                yield _make_part(crew, settings, arm, seed, folder, run_root)
        finally:
            crew.close()


def read_part(folder: Path, settings: Settings, arm: Arm, seed: int) -> dict[str, Any] | None:
    """The run's numbers, if it was made with these settings."""
    path = folder / f"{arm.name}-{seed}.json"
    if not path.exists():
        return None
    part: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return part if part["settings"] == asdict(settings) else None


def _make_part(
    crew: StudyCrew, settings: Settings, arm: Arm, seed: int, folder: Path, run_root: Path
) -> str:
    began = time.monotonic()
    reader = crew.run_arm(settings.spec(arm, seed), run_root, f"{arm.name}-{seed}")
    part = {
        "rule": arm.rule,
        "retention": arm.retention,
        "seed": seed,
        "settings": asdict(settings),
        "seconds": round(time.monotonic() - began, 1),
        **_curve(reader),
    }
    path = folder / f"{arm.name}-{seed}.json"
    path.write_text(json.dumps(part) + "\n", encoding="utf-8")
    return f"{arm.name} seed {seed}: {part['accuracy'][-1]:.1%} in {part['seconds']} s"


def _curve(reader: RunReader) -> dict[str, list[float]]:
    """One value an evaluation: accuracy, and what the learner had seen until then."""
    metrics = reader.read_metrics()
    kept, trunk = [0], [0]
    for column, total in (("tokens_kept", kept), ("learner_tokens", trunk)):
        for value in metrics.column(column).to_pylist():
            total.append(total[-1] + value)
    results = reader.read_evaluations()
    return {
        "step": [one.step for one in results],
        "accuracy": [one.mean for one in results],
        "kept_tokens": [kept[one.step] for one in results],
        "trunk_tokens": [trunk[one.step] for one in results],
        "loss": metrics.column("loss").to_pylist(),
        "reverse_kl_mean": metrics.column("reverse_kl_mean").to_pylist(),
        "grad_norm": metrics.column("grad_norm").to_pylist(),
    }
