"""The whole loop on real engines: two rollout replicas (vLLM), a teacher, two FSDP2 ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.jobs.harness import Crew, quickstart
from tests.jobs.reference import Pair
from tip_ray.control.run_reader import RunReader

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS = 8
FLOAT32 = {
    "student__dtype": "float32",
    "teacher__dtype": "float32",
    "rollout__replicas": 2,
    "learner__replicas": 2,
    "samples_per_step": 128,
    "steps": STEPS,
    "evaluation.0.every_steps": STEPS,
}


@pytest.fixture(scope="module")
def crew(ray_cluster: None) -> Iterator[Crew]:
    crew = Crew.start(quickstart(**FLOAT32))
    yield crew
    crew.close()


@pytest.fixture(scope="module")
def on_policy(crew: Crew, tmp_path_factory: pytest.TempPathFactory) -> RunReader:
    spec = quickstart(**FLOAT32, max_lag=0)
    return crew.train(spec, tmp_path_factory.mktemp("runs"), "on-policy")


@pytest.fixture(scope="module")
def one_behind(crew: Crew, tmp_path_factory: pytest.TempPathFactory) -> RunReader:
    spec = quickstart(**FLOAT32, max_lag=1)
    return crew.train(spec, tmp_path_factory.mktemp("runs"), "one-behind")


def column(reader: RunReader, name: str) -> list[float]:
    return reader.read_metrics().column(name).to_pylist()


@pytest.mark.parametrize("run", ["on_policy", "one_behind"])
def test_the_student_learns(run: str, request: pytest.FixtureRequest) -> None:
    status = request.getfixturevalue(run).read_status()
    assert status.initial_accuracy == pytest.approx(0.42, abs=0.06)
    assert status.accuracy > 0.8  # of 256 problems, one standard error is below 0.03


def test_lag_is_bounded_and_versions_are_recorded(
    on_policy: RunReader, one_behind: RunReader
) -> None:
    assert column(on_policy, "lag") == [0] * STEPS
    assert column(on_policy, "weight_version") == list(range(STEPS))
    lags = column(one_behind, "lag")
    assert max(lags) == 1
    assert lags[0] == 0
    for step in range(1, STEPS + 1):
        samples = on_policy.read_samples(step)
        assert set(samples.column("weight_version").to_pylist()) == {step - 1}


def test_step_one_agrees_with_dense_forwards_of_both_models(on_policy: RunReader) -> None:
    samples: pa.Table = on_policy.read_samples(1)
    assert samples.num_rows == 128
    pair = Pair("carry-student", "carry-teacher")
    worst = dict.fromkeys(("entropy", "reverse_kl", "student", "teacher", "teacher_entropy"), 0.0)
    largest_kl = 0.0
    for row in samples.to_pylist():
        dense = pair.dense(row["prompt_ids"], row["response_ids"])
        for name, found, expected in (
            ("entropy", row["student_entropy"], dense.entropy),
            ("reverse_kl", row["reverse_kl"], dense.reverse_kl),
            ("student", row["student_logprob"], dense.student_logprob),
            ("teacher", row["teacher_logprob"], dense.teacher_logprob),
            ("teacher_entropy", row["teacher_entropy"], dense.teacher_entropy),
        ):
            worst[name] = max(worst[name], float(np.abs(np.array(found) - expected).max()))
        largest_kl = max(largest_kl, float(dense.reverse_kl.max()))
        forward = np.array(row["forward_kl"])
        assert np.all(forward <= dense.forward_kl + 1e-3)
    assert largest_kl > 1.0  # there was something to get wrong
    # The vocabulary (15) is narrower than K (16), so the support holds all of it.
    assert max(worst.values()) < 2e-3, worst


def test_the_recorded_and_the_learners_log_probabilities_agree_on_policy(
    on_policy: RunReader,
) -> None:
    assert max(column(on_policy, "logprob_gap_max")) < 1e-2  # weights travel as float32


def test_every_rollout_is_trained_once_and_half_its_tokens_kept(on_policy: RunReader) -> None:
    metrics = on_policy.read_metrics()
    assert metrics.column("rollouts").to_pylist() == [128] * STEPS
    kept = sum(metrics.column("tokens_kept").to_pylist())
    assert kept / sum(metrics.column("tokens_scored").to_pylist()) == pytest.approx(0.48, abs=0.03)
    for step in range(1, STEPS + 1):
        samples = on_policy.read_samples(step)
        keys = list(
            zip(*(samples.column(n).to_pylist() for n in ("slot", "sample_index")), strict=True)
        )
        assert keys == [(slot, sample) for slot in range(32) for sample in range(4)]
        for kept_flags in samples.column("kept").to_pylist():
            assert sum(kept_flags) == max(1, len(kept_flags) // 2)


def test_fewer_bytes_travel_to_the_learner(on_policy: RunReader) -> None:
    shipped = np.array(column(on_policy, "bytes_cut_to_learner"))
    unpruned = np.array(column(on_policy, "bytes_unpruned_to_learner"))
    assert np.all(shipped / unpruned < 0.56)
    teacher_to_selector = np.array(column(on_policy, "bytes_teacher_to_selector"))
    tokens = np.array(column(on_policy, "tokens_generated"))
    assert np.all(teacher_to_selector / tokens < 22)  # 17 a token, and the keys of short rows


@pytest.mark.parametrize(("dtype", "limit_nats"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_a_teacher_that_is_the_student_teaches_nothing(
    dtype: str, limit_nats: float, tmp_path: Path
) -> None:
    """Identity 6 of TIP, engines included."""
    spec = quickstart(
        student__dtype=dtype,
        teacher__dtype=dtype,
        teacher__model="demo:carry-student",
        steps=1,
        max_lag=0,
        evaluation=[],
    )
    crew = Crew.start(spec)
    try:
        metrics = crew.train(spec, tmp_path, "same").read_metrics().to_pylist()[0]
    finally:
        crew.close()
    assert metrics["reverse_kl_mean"] < limit_nats
    assert metrics["loss"] < limit_nats
    assert metrics["student_entropy_mean"] > 0.01  # real rollouts of an undecided student
