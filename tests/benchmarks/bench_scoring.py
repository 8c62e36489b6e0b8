"""Tokens a second and peak memory of scoring given responses, by what does it.

teacher        the whole score() call of a TeacherActor, engine transformers and engine vllm
trunk          bare transformers: hidden states alone
forward        the same, then full logits and log_softmax at response positions, sampled id read
prompt         vLLM's prompt_logprobs: its own top K, and it cannot leave the prompt's out

All read the same ragged rows in bfloat16, the transformers ones in the same batches. Each is a
process of its own; they take turns call by call, so that whatever else the machine does hits all.
CPU seconds stand beside wall seconds, since they hardly depend on it. Tokens are response tokens.

The model is --models/teacher where it is there, else one of SmolLM2-135M's shape at random.

N  response tokens        V  vocabulary        K  ids of a token's support
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tests.benchmarks.common import print_table, write_json
from tests.benchmarks.memory import in_fresh_process, peak_above_bytes
from tip_ray.contract import tables
from tip_ray.contract.spec import TeacherSpec

Score = Callable[[pa.Table], float]  # mean log-probability of the response tokens, nats

FORWARD = "bare transformers, forward"
SHAPE = {
    "vocab_size": 49152,
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
VOCAB = 49152
PROMPT_TOKENS, RESPONSE_TOKENS = (48, 208), (8, 320)  # least and most of a row


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        path = options.models / "teacher"
        if not path.exists():
            path = in_fresh_process(_save_random_model, Path(folder))
        figures = [
            one
            for threads in options.threads
            for k in options.k
            for one in _compare(str(path), threads, k, options)
        ]
    table = rollouts(options.rows, options.k[0])
    lengths = {name: tables.column(table, name).size for name in ("prompt_ids", "response_ids")}
    write_json(options.output, "scoring", figures, model=str(path), dtype="bfloat16", **lengths)
    print_table([_row(one) for one in figures])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--k", type=int, nargs="+", default=[64])
    return parser.parse_args()


# What is compared: each is made once, in its own process


def _teacher(engine: str) -> Callable[[str, int, int], Score]:
    def make(path: str, threads: int, k: int) -> Score:
        from tip_ray.stages.teacher import TeacherActor

        spec = _spec(path, threads, engine)
        longest = PROMPT_TOKENS[1] + RESPONSE_TOKENS[1]
        actor = TeacherActor(spec, path, VOCAB, k, "student", -30.0, longest)

        def score(table: pa.Table) -> float:
            header, _, targets = actor.score(table)
            assert not header.quarantined
            return float(tables.column(targets, "teacher_sampled_logprob").mean(dtype=np.float64))

        return score

    return make


def _bare(*, head: bool) -> Callable[[str, int, int], Score]:
    def make(path: str, threads: int, k: int) -> Score:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        return torch.inference_mode()(lambda table: _bare_forward(model, table, head=head))

    return make


def _bare_forward(model: Any, table: pa.Table, *, head: bool) -> float:
    """What a careful user writes: rows by length, the head at response positions, in chunks."""
    import torch

    spec, total = _spec("", 1, "transformers"), 0.0
    rows = sorted(_rows(table), key=lambda row: -len(row[0]) - len(row[1]))
    while rows:
        most = max(spec.max_batch_tokens // (len(rows[0][0]) + len(rows[0][1]) - 1), 1)
        batch, rows = rows[:most], rows[most:]
        inputs = [torch.tensor([*prompt, *response[:-1]]) for prompt, response in batch]
        ids_BT = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        needed = [
            one[len(prompt) - 1 : len(prompt) + len(response) - 1]
            for one, (prompt, response) in zip(hidden_BTD, batch, strict=True)
        ]
        hidden_ND = torch.cat(needed)
        sampled_N = torch.cat([torch.tensor(response) for _, response in batch])
        for start in range(0, len(hidden_ND) if head else 0, spec.chunk_rows):
            part = slice(start, start + spec.chunk_rows)
            logprobs_NV = model.lm_head(hidden_ND[part]).float().log_softmax(-1)
            total += float(logprobs_NV.gather(1, sampled_N[part, None]).double().sum())
    return total / len(tables.column(table, "response_ids")) if head else float("nan")


def _prompt_logprobs(path: str, threads: int, k: int) -> Score:
    from tip_ray.stages.engines.workarounds import cpu_engine_args, prepare_process

    spec = _spec(path, threads, "vllm")
    prepare_process(spec)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=path,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=PROMPT_TOKENS[1] + RESPONSE_TOKENS[1] + 1,
        max_logprobs=k,
        enable_prefix_caching=False,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **cpu_engine_args(spec.max_batch_tokens),
    )
    wanted = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=k, detokenize=False, flat_logprobs=True
    )

    def score(table: pa.Table) -> float:
        rows = _rows(table)
        prompts = [{"prompt_token_ids": [*prompt, *response]} for prompt, response in rows]
        outputs = llm.generate(prompts, wanted, use_tqdm=False)
        total = 0.0
        for output, (prompt, _) in zip(outputs, rows, strict=True):
            found = output.prompt_logprobs  # of every position its own token first, then the top K
            total += sum(found.logprobs[start] for start in found.start_indices[len(prompt) :])
        return total / len(tables.column(table, "response_ids"))

    return score


CONTENDERS: dict[str, Callable[[str, int, int], Score]] = {
    FORWARD: _bare(head=True),
    "bare transformers, trunk": _bare(head=False),
    "teacher, engine transformers": _teacher("transformers"),
    "teacher, engine vllm": _teacher("vllm"),
    "vLLM prompt_logprobs": _prompt_logprobs,
}


# Taking turns


def _compare(path: str, threads: int, k: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record a contender; of its calls, one warms up, one is for memory, the rest are timed."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with ExitStack() as stack:
        pipes = {
            name: stack.enter_context(_process(name, path, threads, k, options.rows))
            for name in CONTENDERS
        }
        for turn in range(options.repeats + 2):
            for name in list(CONTENDERS)[:: 1 if turn % 2 else -1]:
                pipes[name].send(turn == 1)
                answers[name].append(pipes[name].recv())
    return [
        {
            "contender": name,
            "threads": threads,
            "k": k,
            "rows": options.rows,
            "tokens": int(calls[0]["tokens"]),
            "sampled_logprob_mean": calls[0]["logprob"],
            "peak_bytes": int(calls[1]["peak_bytes"]),
            "wall_s": [call["wall_s"] for call in calls[2:]],
            "cpu_s": [call["cpu_s"] for call in calls[2:]],
            "wall_against_forward": _ratio(calls, answers[FORWARD], "wall_s"),
            "cpu_against_forward": _ratio(calls, answers[FORWARD], "cpu_s"),
        }
        for name, calls in answers.items()
    ]


def _ratio(calls: list[dict[str, float]], others: list[dict[str, float]], what: str) -> float:
    """The median over turns of one's seconds by the other's."""
    pairs = zip(calls[2:], others[2:], strict=True)
    return statistics.median(call[what] / other[what] for call, other in pairs)


@contextmanager
def _process(name: str, path: str, threads: int, k: int, rows: int) -> Iterator[Connection]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(name, path, threads, k, rows, there)
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


def _serve(name: str, path: str, threads: int, k: int, rows: int, pipe: Connection) -> None:
    """Score the same rows whenever asked, with or without a look at memory, until it closes."""
    score, table = CONTENDERS[name](path, threads, k), rollouts(rows, k)
    pipe.send("up")
    try:
        while True:
            with_memory = pipe.recv()
            wall_s, cpu_s, peak_bytes = time.perf_counter(), time.process_time(), 0
            if with_memory:
                logprob, peak_bytes = peak_above_bytes(lambda: score(table))
            else:
                logprob = score(table)
            pipe.send(
                {
                    "wall_s": time.perf_counter() - wall_s,
                    "cpu_s": time.process_time() - cpu_s,
                    "peak_bytes": peak_bytes,
                    "logprob": logprob,
                    "tokens": len(tables.column(table, "response_ids")),
                }
            )
    except EOFError:
        return


# What is scored


def rollouts(rows: int, k: int) -> pa.Table:
    """ROLLOUTS of random tokens, ragged; the student's numbers are those of a flat distribution."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(96), 0.7, rows)).astype(np.int64).clip(*RESPONSE_TOKENS)
    tokens, ends = int(lengths.sum()), np.concatenate([[0], np.cumsum(lengths)])
    schema = tables.rollouts_schema(k)
    topk_ids_NK = rng.integers(0, VOCAB // k, (tokens, 1)) * k + np.arange(k)
    values: dict[str, npt.NDArray[Any]] = {
        "response_ids": rng.integers(0, VOCAB, tokens, dtype=np.int32),
        "loss_mask": np.ones(tokens, np.uint8),
        "student_logprob": np.full(tokens, -np.log(VOCAB), np.float32),
        "student_entropy": np.full(tokens, np.log(VOCAB), np.float32),
        "student_topk_ids": topk_ids_NK.astype(np.int32),
        "student_topk_logprobs": np.full((tokens, k), -np.log(VOCAB), np.float32),
        "student_tail_logprob": np.full(tokens, np.log1p(-k / VOCAB), np.float32),
    }
    columns: dict[str, Any] = {
        name: tables.list_array(flat, ends, schema.field(name).type)
        for name, flat in values.items()
    }
    columns |= {name: [0] * rows for name in ("step", "sample_index", "attempt", "weight_version")}
    columns |= {"slot": list(range(rows)), "prompt_uid": ["p"] * rows, "reward": [None] * rows}
    prompts = rng.integers(*PROMPT_TOKENS, rows)
    columns["prompt_ids"] = [rng.integers(0, VOCAB, size).tolist() for size in prompts]
    columns |= {"teacher_prompt_ids": [None] * rows, "finish_reason": ["length"] * rows}
    return tables.build(schema, columns)


def _rows(table: pa.Table) -> list[tuple[list[int], list[int]]]:
    columns = (table.column(name).to_pylist() for name in ("prompt_ids", "response_ids"))
    return list(zip(*columns, strict=True))


def _spec(path: str, threads: int, engine: str) -> TeacherSpec:
    return TeacherSpec(model=path, engine=engine, num_cpus=threads)


def _save_random_model(folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def _row(one: dict[str, Any]) -> dict[str, Any]:
    wall_s, cpu_s = (statistics.median(one[name]) for name in ("wall_s", "cpu_s"))
    return {
        **{name: one[name] for name in ("contender", "threads")},
        "K": one["k"],
        "tokens/s": one["tokens"] / wall_s,
        "wall s, median": wall_s,
        "CPU s, median": cpu_s,
        "wall against forward": f"{one['wall_against_forward']:.2f}",
        "CPU against forward": f"{one['cpu_against_forward']:.2f}",
        "peak MiB above the loaded model": one["peak_bytes"] / 2**20,
        "mean log-probability": f"{one['sampled_logprob_mean']:.4f}",
    }


if __name__ == "__main__":
    main()
