"""vLLM over two processes: tensor parallel, and two replicas on one machine."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

from tests.stages.rollout_toys import (
    assert_ending,
    assert_trace,
    by_index,
    config,
    opened,
    prompt,
    reference_model,
    request,
    save_student,
)
from tip_ray.stages.engines.vllm import VllmEngine


def test_tensor_parallel_two(tmp_path: Path) -> None:
    """Recorder, weights through shared memory, and aborts, reached as at size 1."""
    old_path = save_student(tmp_path / "old", kind="llama")
    new_path = save_student(tmp_path / "new", kind="llama", seed=1)
    asked = [request(i, prompt(4 + 5 * i)) for i in range(6)]
    shared_before = set(os.listdir("/dev/shm"))  # noqa: S108
    with opened(VllmEngine(config(old_path, tensor_parallel=2, num_cpus=2))) as engine:
        old, new = reference_model(old_path), reference_model(new_path)
        done = by_index(engine.generate(asked))
        for one in asked:
            assert_trace(old, one, done[one.index])
            assert_ending(one, done[one.index])
        engine.load_weights(new.named_parameters())
        left_over = set(os.listdir("/dev/shm")) - shared_before  # noqa: S108
        assert not [name for name in left_over if name.startswith("tip-ray")]
        stream = engine.generate(asked)
        next(stream)
        stream.close()
        assert engine._rpc("tip_ray_discard", []) == 0
        done = by_index(engine.generate(asked))
        for one in asked:
            assert_trace(new, one, done[one.index])


def test_two_replicas_share_a_machine(tmp_path: Path) -> None:
    """Both at once, and neither has bound its threads to cores that the other one uses."""
    path = save_student(tmp_path / "student")
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=_replica, args=(path, there))
    other.start()
    there.close()
    try:
        with opened(VllmEngine(config(path))) as engine:
            assert here.recv() == "up"
            here.send("go")
            own_cores, own_responses = _work(engine)
        other_cores, other_responses = here.recv()
    finally:
        other.join(timeout=60)
        other.kill()
    assert own_cores == other_cores == {frozenset(os.sched_getaffinity(0))}
    assert own_responses == other_responses


def _replica(path: str, pipe: Connection) -> None:
    with opened(VllmEngine(config(path))) as engine:
        pipe.send("up")
        pipe.recv()
        pipe.send(_work(engine))


def _work(engine: VllmEngine) -> tuple[set[frozenset[int]], dict[int, list[int]]]:
    """The cores that each thread may use, and responses by index."""
    done = by_index(engine.generate([request(i, prompt(5)) for i in range(8)]))
    threads = [int(name) for name in os.listdir("/proc/self/task")]
    cores = {frozenset(os.sched_getaffinity(thread)) for thread in threads}
    return cores, {index: done[index].response_ids.tolist() for index in sorted(done)}
