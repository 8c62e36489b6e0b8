"""The vLLM teacher as its pool runs it: in a Ray actor, over two processes, in the whole loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from tests.jobs.harness import Crew, quickstart
from tests.stages.teacher_toys import FLOOR, VLLM_LLAMA, V, assert_same, rollouts
from tests.stages.toys import save_model
from tip_ray.contract.spec import TeacherSpec
from tip_ray.runtime.pool import Pool
from tip_ray.runtime.replica import actor_class
from tip_ray.stages.teacher import TeacherActor

pytestmark = pytest.mark.usefixtures("ray_cluster")

LENGTHS = ((3, 5), (1, 1), (9, 12), (4, 0), (140, 7), (300, 90))


def _silent(kind: str, **facts: Any) -> None:
    raise AssertionError(f"{kind}: {facts}")


def _children() -> set[int]:
    return {one.pid for one in psutil.Process().children(recursive=True)}


def _titles(before: set[int]) -> dict[psutil.Process, str]:
    """Of the processes below this one that were not there `before`."""
    found = {}
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.pid not in before:
                found[one] = " ".join(one.cmdline())
    return found


def _vllm_workers(before: set[int]) -> list[psutil.Process]:
    return [one for one, title in _titles(before).items() if "VLLM::Worker" in title]


def test_tensor_parallel_two_equals_the_transformers_trunk(tmp_path: Path) -> None:
    student = save_model(tmp_path / "student", 1, **VLLM_LLAMA)
    path = save_model(tmp_path / "teacher", 2, **VLLM_LLAMA)
    table = rollouts(student, 4, own_prompts=True, lengths=LENGTHS)
    settings: dict[str, Any] = {"model": path, "dtype": "float32", "max_batch_tokens": 256}
    facts: tuple[Any, ...] = (path, V, 4, "student", FLOOR, 512)
    expected = TeacherActor(TeacherSpec(**settings), *facts).score(table)

    spec = TeacherSpec(**settings, engine="vllm", tensor_parallel=2, num_cpus=2)
    remote = actor_class(TeacherActor).options(num_cpus=spec.num_cpus)
    before = _children()
    pool = Pool("teacher", lambda _: remote.remote(spec, *facts), 1,
                timeout_s=300, max_tries=1, on_event=_silent)  # fmt: skip

    async def score() -> list[Any]:
        await pool.start()
        answers = [await pool.call("score", ray.put(table), returns=3) for _ in range(2)]
        return [(answer.header, *ray.get(list(answer.refs))) for answer in answers]

    try:
        for found in asyncio.run(score()):
            assert_same(found, expected)
        deadline = time.monotonic() + 20
        while len(workers := _vllm_workers(before)) != 2:
            assert time.monotonic() < deadline, _titles(before)
            time.sleep(0.1)
    finally:
        pool.close()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers must not outlive a replica that is killed"


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path: Path) -> None:
    """Identity 6 of TIP through the whole loop, both sides on vLLM, in float32."""
    spec = quickstart(
        student__dtype="float32",
        teacher__dtype="float32",
        teacher__engine="vllm",
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
    assert metrics["reverse_kl_mean"] < 1e-5
    assert metrics["loss"] < 1e-5
    assert metrics["student_entropy_mean"] > 0.01  # real rollouts of an undecided student
