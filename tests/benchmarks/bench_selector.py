"""How fast one core decides a step, and what memory it takes: SelectorActor.select as a whole.

SCORES of one step come in as they do in a run, a table for each teacher batch; KEEP goes out. No
part is left out: joining the tables, checking them, the rule, the weights, quadrants, ranks and the
header. One thread, pinned; the rates are per second of that thread's CPU time, wall seconds stand
in the JSON. Rules take turns, repeat by repeat, so that whatever else the machine does hits all.

    python -m tests.benchmarks.bench_selector --output outputs/bench
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.benchmarks.common import print_table, write_json
from tests.benchmarks.memory import in_fresh_process, peak_above_bytes
from tip_ray.contract import tables
from tip_ray.contract.spec import BUILTIN_RULES, SAMPLING_RULES, LossSpec, SelectionSpec
from tip_ray.stages.selector import SelectorActor

VOCAB, PROMPT_TOKENS, RANKS = 151936, 16, 8
TEACHER_BATCH_TOKENS = 8192
WEIGHED = " + inclusion"  # a sampling rule with reweight: inclusion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--row-tokens", type=int, nargs="+", default=[24, 256, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--retention", type=float, default=0.5)
    given = parser.parse_args()
    names = [*BUILTIN_RULES, *(rule + WEIGHED for rule in SAMPLING_RULES)]
    results = []
    for row_tokens in given.row_tokens:
        step = (given.tokens, row_tokens, given.retention)
        seconds = in_fresh_process(_seconds, names, *step, given.repeats)
        for name in names:
            peak_bytes, scores_bytes, keep_bytes = in_fresh_process(_memory, name, *step)
            results.append(
                {
                    "rule": name,
                    "row_tokens": row_tokens,
                    "wall_s": [wall for wall, _ in seconds[name]],
                    "cpu_s": [cpu for _, cpu in seconds[name]],
                    "tokens": given.tokens // row_tokens * row_tokens,
                    "peak_bytes": peak_bytes,
                    "scores_bytes": scores_bytes,
                    "keep_bytes": keep_bytes,
                }
            )
    write_json(given.output, "selector", results, retention=given.retention, cores=1)
    print_table(_summary(results))


def _seconds(
    names: list[str], tokens: int, row_tokens: int, retention: float, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each call, by rule."""
    _on_one_core()
    made, asked = scores(tokens, row_tokens)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name in names:
            actor = _actor(name, retention)
            began, cpu_began = time.perf_counter(), time.process_time()
            actor.select(asked, {}, None, *made)
            seconds = (time.perf_counter() - began, time.process_time() - cpu_began)
            if repeat:  # the first call warms up
                taken[name].append(seconds)
    return taken


def _memory(name: str, tokens: int, row_tokens: int, retention: float) -> tuple[int, int, int]:
    """(peak bytes above the SCORES that came in, their bytes, KEEP's)."""
    _on_one_core()
    _actor(name, retention).select(*_arguments(TEACHER_BATCH_TOKENS, row_tokens))  # loads code
    made, asked = scores(tokens, row_tokens)
    actor = _actor(name, retention)
    (_, keep), peak_bytes = peak_above_bytes(lambda: actor.select(asked, {}, None, *made))
    return peak_bytes, sum(map(tables.nbytes, made)), tables.nbytes(keep)


def _arguments(tokens: int, row_tokens: int) -> tuple[Any, ...]:
    made, asked = scores(tokens, row_tokens)
    return asked, {}, None, *made


def _actor(name: str, retention: float) -> SelectorActor:
    rule = name.removesuffix(WEIGHED)
    options: dict[str, Any] = {} if rule == "all" else {"retention": retention}
    options |= {"reweight": "inclusion"} if name.endswith(WEIGHED) else {}
    selection = SelectionSpec(rule=rule, **options)
    return SelectorActor(selection, LossSpec(), vocab_size=VOCAB, ranks=RANKS, samples=4, seed=0)


def scores(tokens: int, row_tokens: int) -> tuple[list[pa.Table], dict[tables.Key, int]]:
    """SCORES of one step, a table a teacher batch, and the tokens of each rollout by key."""
    rng = np.random.default_rng(0)
    rows, in_batch = tokens // row_tokens, max(TEACHER_BATCH_TOKENS // row_tokens, 1)
    made = [
        _teacher_batch(rng, np.arange(start, min(start + in_batch, rows)), row_tokens)
        for start in range(0, rows, in_batch)
    ]
    return made, dict.fromkeys(_keys(rows), PROMPT_TOKENS + row_tokens)


def _keys(rows: int) -> Iterator[tables.Key]:
    return ((1, row // 4, row % 4) for row in range(rows))


def _teacher_batch(
    rng: np.random.Generator, rows: np.typing.NDArray[np.int64], row_tokens: int
) -> pa.Table:
    """Skewed entropies and divergences, as of a student near its teacher."""
    tokens = len(rows) * row_tokens
    ends = np.arange(len(rows) + 1) * row_tokens
    values: dict[str, np.typing.NDArray[Any]] = {
        name: rng.gamma(0.3, scale, tokens).astype(np.float32)
        for name, scale in (
            ("student_entropy", 1.0),
            ("reverse_kl", 0.3),
            ("forward_kl", 0.4),
            ("teacher_entropy", 0.9),
        )
    }
    values["loss_mask"] = np.ones(tokens, np.uint8)
    columns: dict[str, Any] = {
        name: tables.list_array(flat, ends, tables.SCORES.field(name).type)
        for name, flat in values.items()
    }
    columns |= {"step": np.ones(len(rows), np.int64), "attempt": np.zeros(len(rows), np.int32)}
    columns |= {"slot": (rows // 4).astype(np.int32), "sample_index": (rows % 4).astype(np.int32)}
    columns["prompt_uid"] = [f"prompt-{row // 4}" for row in rows]
    return tables.build(tables.SCORES, columns)


def _on_one_core() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)


def _summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a rule: million tokens/s and peak by row length."""
    lines: dict[str, dict[str, Any]] = {}
    for one in results:
        line = lines.setdefault(one["rule"], {"rule": one["rule"]})
        rate = one["tokens"] / statistics.median(one["cpu_s"])
        line[f"M tokens/s, rows of {one['row_tokens']}"] = rate / 1e6
    for one in results:
        peak_mib = one["peak_bytes"] / 2**20
        lines[one["rule"]][f"peak MiB, rows of {one['row_tokens']}"] = peak_mib
    return list(lines.values())


if __name__ == "__main__":
    main()
