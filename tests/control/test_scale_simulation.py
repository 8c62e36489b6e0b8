"""The simulation of many replicas, at toy size: the real loop over stages that only sleep."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray
from ray._private import internal_api

from tests.benchmarks.scale_run import (
    Crew,
    Marks,
    Replicas,
    Shape,
    critical_path_s,
    figures,
    spec_of,
)
from tests.benchmarks.scale_stages import MIN_ROWS, Load, Made, make_contents
from tip_ray.contract.run_state import StepMetrics
from tip_ray.control.audit import check_audit

pytestmark = pytest.mark.usefixtures("ray_cluster")

REPLICAS, STEPS, TOKENS, LONG = Replicas(2, 2, 2), 3, 16, 2048
LOAD = Load(rows=24, response_tokens=TOKENS, rollout_s=0.2, teacher_s=0.1, learner_s=0.1)


@pytest.fixture(scope="module")
def crew(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    made = Made(tmp_path_factory.mktemp("made"), weight_groups=2, group_bytes=1000)
    make_contents(made.directory, MIN_ROWS * LONG, k=8)
    shape = Shape("topk", 8, 8)
    spec = spec_of(shape, REPLICAS, placed=False)
    crew = Crew.start(spec.model_copy(update={"samples_per_step": 0}), shape, made)
    yield crew
    crew.close()


@pytest.mark.parametrize("max_lag", [0, 1])
def test_every_rollout_passes_all_stages_once(crew: Crew, max_lag: int) -> None:
    marks, reader = crew.run(LOAD, steps=STEPS, max_lag=max_lag)
    spec = crew.spec
    prompts = spec.prompts.model_copy(update={"prompts_per_step": LOAD.rows // 4})
    assert check_audit(reader, spec.model_copy(update={"prompts": prompts})).exactly_once
    assert [mark.metrics.step for mark in marks] == [1, 2, 3]
    assert {mark.metrics.tokens_generated for mark in marks} == {LOAD.rows * TOKENS}
    assert {mark.metrics.tokens_kept for mark in marks} == {LOAD.rows * TOKENS // 2}
    found = figures(marks, LOAD, REPLICAS)
    assert found["hops_bytes"]["weights"] == 2 * 1000 * REPLICAS.rollout
    assert 0 < found["hops_bytes"]["cut -> learner"] < found["hops_bytes"]["unpruned -> learner"]
    assert crew.events == []


def test_a_step_cannot_be_shorter_than_its_stages_sleep(crew: Crew) -> None:
    marks, _ = crew.run(LOAD, steps=STEPS, max_lag=0)
    found = figures(marks, LOAD, REPLICAS)
    # Two shards of 12 rows: tables of 8 and 4 rows each; the last is scored once it is there.
    assert found["ideal_s"] == pytest.approx(0.1 + 0.1 * 4 / 24 + 0.1 / 2)
    assert found["step_s"] >= found["ideal_s"]
    assert critical_path_s(LOAD, Replicas(1, 1, 1)) == pytest.approx(0.2 + 0.1 * 8 / 24 + 0.1)


def test_a_step_that_is_over_has_left_nothing_in_the_object_store(crew: Crew) -> None:
    """Nor does it wait for the step after it, or for garbage collection."""
    before = stored_bytes()

    class Waiting(Marks):
        def step(self, metrics: StepMetrics, *_: object) -> None:
            super().step(metrics)
            deadline = time.monotonic() + 10
            while stored_bytes() - before > metrics.bytes_cut_to_learner / 10:
                assert time.monotonic() < deadline, (metrics.step, stored_bytes() - before)
                time.sleep(0.2)

    load = replace(LOAD, response_tokens=LONG)
    marks, _ = crew.run(load, steps=STEPS, max_lag=0, marks=Waiting())
    assert marks[0].metrics.bytes_cut_to_learner > 10 * 100_000  # Ray stores what is larger


def stored_bytes() -> int:
    node = ray.nodes()[0]
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    stats = internal_api.node_stats(*address, include_memory_info=False)
    return int(stats.store_stats.object_store_bytes_used)
