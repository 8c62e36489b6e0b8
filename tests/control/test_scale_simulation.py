"""The simulation of many replicas, at toy size: the real loop over stages that only sleep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.benchmarks.scale_run import Crew, Shape, critical_path_s, figures, spec_of
from tests.benchmarks.scale_stages import MIN_ROWS, Load, Made, make_contents
from tip_ray.control.audit import check_audit

pytestmark = pytest.mark.usefixtures("ray_cluster")

REPLICAS, STEPS, TOKENS = 2, 3, 16
LOAD = Load(rows=24, response_tokens=TOKENS, rollout_s=0.2, teacher_s=0.1, learner_s=0.1)


@pytest.fixture(scope="module")
def crew(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    made = Made(tmp_path_factory.mktemp("made"), weight_groups=2, group_bytes=1000)
    make_contents(made.directory, MIN_ROWS * TOKENS, k=8)
    shape = Shape("topk", 8, 8)
    crew = Crew.start(spec_of(shape, REPLICAS, placed=False), shape, made)
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
    assert found["hops_bytes"]["weights"] == 2 * 1000 * REPLICAS
    assert 0 < found["hops_bytes"]["cut -> learner"] < found["hops_bytes"]["unpruned -> learner"]
    assert crew.events == []


def test_a_step_cannot_be_shorter_than_its_stages_sleep(crew: Crew) -> None:
    marks, _ = crew.run(LOAD, steps=STEPS, max_lag=0)
    found = figures(marks, LOAD, REPLICAS)
    # Two shards of 12 rows: tables of 8 and 4 rows each; the last is scored once it is there.
    assert found["ideal_s"] == pytest.approx(0.1 + 0.1 * 4 / 24 + 0.1 / 2)
    assert found["step_s"] >= found["ideal_s"]
    assert critical_path_s(LOAD, 1) == pytest.approx(0.2 + 0.1 * 8 / 24 + 0.1)
