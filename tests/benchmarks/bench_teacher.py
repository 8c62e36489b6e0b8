"""Which trunk makes the faster teacher on a CPU: a whole score() call, LM head included.

A Llama of SmolLM2-135M's shape with random weights in bfloat16. The two engines, each in a process
of its own, take turns call by call, so that whatever else the machine does hits both; CPU seconds
stand beside wall seconds, since they hardly depend on it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.benchmarks.common import print_table, write_json
from tip_ray.contract import tables

ENGINES = ("transformers", "vllm")
VOCAB, K = 49152, 16
PROMPT_TOKENS, RESPONSE_TOKENS = 96, 128
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = _in_process(_save_model, folder)
        for threads in given.threads:
            results += _compare(path, threads, given.rows, given.repeats)
    write_json(
        given.output,
        "teacher",
        results,
        model=SHAPE,
        dtype="bfloat16",
        tokens_a_row=PROMPT_TOKENS + RESPONSE_TOKENS,
        response_tokens=RESPONSE_TOKENS,
    )
    print_table([_summary(one) for one in results])


def _compare(path: str, threads: int, rows: list[int], repeats: int) -> list[dict[str, Any]]:
    """Seconds of each call, by engine and number of rows; the engines take turns."""
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with _teacher("transformers", path, threads) as one, _teacher("vllm", path, threads) as other:
        pipes = {"transformers": one, "vllm": other}
        for repeat in range(repeats + 1):
            for count in rows:
                for engine in ENGINES if repeat % 2 else reversed(ENGINES):
                    pipes[engine].send(count)
                    seconds = pipes[engine].recv()
                    if repeat:  # the first call warms up
                        taken.setdefault((engine, count), []).append(seconds)
    return [
        {
            "engine": engine,
            "threads": threads,
            "rows": count,
            "wall_s": [wall for wall, _ in seconds],
            "cpu_s": [cpu for _, cpu in seconds],
        }
        for (engine, count), seconds in sorted(taken.items(), key=lambda item: item[0][::-1])
    ]


@contextmanager
def _teacher(engine: str, path: str, threads: int) -> Iterator[Connection]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(engine, path, threads, there)
    )
    process.start()
    there.close()
    try:
        assert here.recv() == "up"
        yield here
    finally:
        here.close()
        process.join(timeout=60)
        process.kill()


def _serve(engine: str, path: str, threads: int, pipe: Connection) -> None:
    """Answer a number of rows with (wall, CPU) seconds of scoring them, until the pipe closes."""
    from tip_ray.contract.spec import TeacherSpec
    from tip_ray.stages.teacher import TeacherActor

    spec = TeacherSpec(model=path, engine=engine, num_cpus=threads)
    longest = PROMPT_TOKENS + RESPONSE_TOKENS
    teacher = TeacherActor(spec, path, VOCAB, K, "student", -30.0, longest)
    pipe.send("up")
    try:
        while True:
            table = rollouts(pipe.recv())
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            header, _, _ = teacher.score(table)
            pipe.send((time.perf_counter() - wall_s, time.process_time() - cpu_s))
            assert not header.quarantined
    except EOFError:
        return


def rollouts(rows: int) -> pa.Table:
    """ROLLOUTS of random tokens; the student's numbers are those of a flat distribution."""
    rng = np.random.default_rng(0)
    tokens = rows * RESPONSE_TOKENS
    ends = np.arange(rows + 1) * RESPONSE_TOKENS
    schema = tables.rollouts_schema(K)
    topk_ids_NK = rng.integers(0, VOCAB // K, (tokens, 1)) * K + np.arange(K)
    values: dict[str, Any] = {
        "response_ids": rng.integers(0, VOCAB, tokens, dtype=np.int32),
        "loss_mask": np.ones(tokens, np.uint8),
        "student_logprob": np.full(tokens, -np.log(VOCAB), np.float32),
        "student_entropy": np.full(tokens, np.log(VOCAB), np.float32),
        "student_topk_ids": topk_ids_NK.astype(np.int32),
        "student_topk_logprobs": np.full((tokens, K), -np.log(VOCAB), np.float32),
        "student_tail_logprob": np.full(tokens, np.log1p(-K / VOCAB), np.float32),
    }
    columns: dict[str, Any] = {
        name: tables.list_array(flat, ends, schema.field(name).type)
        for name, flat in values.items()
    }
    columns |= {name: [0] * rows for name in ("step", "sample_index", "attempt", "weight_version")}
    columns |= {"slot": list(range(rows)), "prompt_uid": ["p"] * rows, "reward": [None] * rows}
    columns["prompt_ids"] = rng.integers(0, VOCAB, (rows, PROMPT_TOKENS)).tolist()
    columns |= {"teacher_prompt_ids": [None] * rows, "finish_reason": ["length"] * rows}
    return tables.build(schema, columns)


def _save_model(folder: str) -> str:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def _in_process(function: Any, *args: Any) -> Any:
    """In a process of its own, whose memory is gone when the engines start."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def _summary(one: dict[str, Any]) -> dict[str, Any]:
    wall_s, cpu_s = one["wall_s"], one["cpu_s"]
    return {
        **{name: one[name] for name in ("threads", "rows", "engine")},
        "wall s, median": statistics.median(wall_s),
        "wall s, least": min(wall_s),
        "CPU s, median": statistics.median(cpu_s),
        "CPU s, least": min(cpu_s),
    }


if __name__ == "__main__":
    main()
