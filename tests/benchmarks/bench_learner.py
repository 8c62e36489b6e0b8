"""What a learner's head and loss cost, and its whole step: four ways to the same loss.

    dense       logits of all N rows in float32, log_softmax, gather, autograd
    kept        a chunked loss that keeps the student's logits for its backward
    recomputed  a chunked loss, each chunk checkpointed
    ours        tip_ray.compute.loss.kept_loss, on the kept rows only

The first three see every row; at retention 1 all four give the same value and gradients, which is
checked first. Every cell runs in a fresh process; its peak is the kernel's high-water mark of
resident memory above the resident model and inputs, gradients included (memory.py). The model is a
Qwen3 with Qwen3's vocabulary, narrow and of two layers, in float32: what is [N, V] does not depend
on its width. Seconds are CPU seconds of one thread, wall seconds stand in the JSON. A cell that
would not fit into memory is told so by computation and left out.

    python -m tests.benchmarks.bench_learner --output outputs/bench          # 8k rows, 7 minutes
    python -m tests.benchmarks.bench_learner --output outputs/bench --full   # 1k to 16k

N  rows (input tokens)    D  hidden size    V  vocabulary    K  support    B, T  a batch's shape
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.common import print_table, write_json
from tests.benchmarks.learner_baselines import LOSSES, largest_difference, made_targets
from tests.benchmarks.memory import fits, in_fresh_process, peak_above_bytes

VOCAB, K, CHUNK_ROWS, ROW_TOKENS = 151_936, 64, 512, 1024
LAYERS = 2
TOLERANCE = 2e-4  # of value and gradients in float32, relative to the largest
SPARE_BYTES = 1 << 30  # for everything else that runs here
BASELINES = ("recomputed", "kept", "dense")  # the largest last
PARTS = ("head", "step")
RATIOS = {"memory": "peak_bytes", "time": "cpu_s"}


def main() -> None:
    given = _options()
    differences = in_fresh_process(largest_difference, 256, given.hidden_size, VOCAB, K)
    apart = {name: one for name, one in differences.items() if one > TOLERANCE}
    if apart:
        raise SystemExit(f"learner: these do not compute the same loss: {apart}")
    results = []
    for part, rows in itertools.product(PARTS, given.rows):
        cells = [("ours", one) for one in given.retention] + [(name, 1.0) for name in BASELINES]
        if given.full:
            cells.append(("ours, with statistics", 0.5))
        for name, retention in cells:
            results.append(_cell(part, name, rows, retention, given))
            _write(given, results, differences)  # what is there, should the rest be cut off
    for part in PARTS:
        print_table(_table(results, part))
    print_table(_ratios(results))


def _write(given: argparse.Namespace, results: list[Any], differences: dict[str, float]) -> None:
    write_json(
        given.output,
        "learner",
        {"cells": results, "ratios": _ratios(results)},
        vocab_size=VOCAB,
        k=K,
        chunk_rows=CHUNK_ROWS,
        hidden_size=given.hidden_size,
        layers=LAYERS,
        dtype="float32",
        threads=1,
        largest_relative_differences=differences,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="all row counts and retentions")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--retention", type=float, nargs="+")
    parser.add_argument("--hidden-size", type=int, default=256)
    given = parser.parse_args()
    given.rows = given.rows or ([1024, 2048, 4096, 8192, 16384] if given.full else [8192])
    given.retention = given.retention or ([1.0, 0.5, 0.2, 0.1] if given.full else [1.0, 0.5, 0.1])
    return given


def _cell(
    part: str, name: str, rows: int, retention: float, given: argparse.Namespace
) -> dict[str, Any]:
    """Peak bytes and seconds of one forward and backward; None where it does not fit."""
    need_bytes = _need_bytes(part, name, rows, given.hidden_size)
    cell = {"part": part, "loss": name, "rows": rows, "retention": retention}
    measured: tuple[float | None, ...] = (None, None, None)
    if fits(need_bytes + SPARE_BYTES):
        measured = in_fresh_process(_measure, part, name, rows, retention, given.hidden_size)
    cell |= dict(zip(("peak_bytes", "wall_s", "cpu_s"), measured, strict=True))
    return cell | {"computed_need_bytes": need_bytes}


def _need_bytes(part: str, name: str, rows: int, hidden_size: int) -> int:
    """A generous count of float32 buffers, resident model included."""
    logits = {"dense": 3 * rows, "kept": rows + 2 * CHUNK_ROWS}.get(name, 4 * CHUNK_ROWS)
    trunk = rows * LAYERS * 50 * hidden_size if part == "step" else 0
    return 4 * (VOCAB * logits + 4 * VOCAB * hidden_size + trunk)


def _measure(
    part: str, name: str, rows: int, retention: float, hidden_size: int
) -> tuple[int, float, float]:
    """(peak bytes above what was resident, wall seconds, CPU seconds)."""
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # us before others
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prepare = _head_alone if part == "head" else _whole_step
    prepare(name, 64, 1.0, hidden_size)()  # loads code
    work = prepare(name, rows, retention, hidden_size)
    began, cpu_began = time.perf_counter(), time.process_time()
    _, peak_bytes = peak_above_bytes(work)
    return peak_bytes, time.perf_counter() - began, time.process_time() - cpu_began


def _head_alone(name: str, rows: int, retention: float, hidden_size: int) -> Callable[[], None]:
    """Forward and backward of head and loss, from what the trunk gave to the trunk's gradient."""
    hidden_ND = torch.randn(rows, hidden_size).requires_grad_()
    head_VD = (torch.randn(VOCAB, hidden_size) * 0.02).requires_grad_()
    targets, kept_N = made_targets(rows, VOCAB, K), _kept(rows, retention)

    def work() -> None:
        kept_ND = hidden_ND if kept_N is None else hidden_ND.index_select(0, kept_N)
        own = targets if kept_N is None else targets.rows(kept_N)
        LOSSES[name](kept_ND, head_VD, own, CHUNK_ROWS).backward()

    return work


def _whole_step(name: str, rows: int, retention: float, hidden_size: int) -> Callable[[], None]:
    """Trunk, head and loss, forward and backward, rollouts of 1,024 tokens; no optimizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM  # slow to load, and not in `head`

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).train()
    input_ids_BT = torch.randint(VOCAB, (rows,)).view(-1, min(rows, ROW_TOKENS))
    targets, kept_N = made_targets(rows, VOCAB, K), _kept(rows, retention)

    def work() -> None:
        trunk = model.base_model(input_ids=input_ids_BT, use_cache=False)
        hidden_ND = trunk.last_hidden_state.flatten(0, 1)
        kept_ND = hidden_ND if kept_N is None else hidden_ND.index_select(0, kept_N)
        own = targets if kept_N is None else targets.rows(kept_N)
        LOSSES[name](kept_ND, model.lm_head.weight, own, CHUNK_ROWS).backward()

    return work


def _kept(rows: int, retention: float) -> Tensor | None:
    """Rows that are kept, ascending; None: all, without a copy."""
    if retention == 1:
        return None
    return torch.randperm(rows)[: int(rows * retention)].sort().values


def _table(results: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """A line a loss and retention; GiB and seconds by number of rows."""
    lines: dict[tuple[str, float], dict[str, Any]] = {}
    own = sorted((one for one in results if one["part"] == part), key=lambda one: one["rows"])
    for unit in ("GiB", "s"):
        for one in own:
            key = (one["loss"], one["retention"])
            line = lines.setdefault(key, {part: one["loss"], "retention": one["retention"]})
            line[f"{unit}, N={one['rows']}"] = _gib(one) if unit == "GiB" else one["cpu_s"]
    return list(lines.values())


def _gib(one: dict[str, Any]) -> float | str:
    if one["peak_bytes"] is None:
        return f"does not fit ({one['computed_need_bytes'] / 2**30:.0f})"
    return float(one["peak_bytes"] / 2**30)


def _ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against each baseline, by what fusing does alone (retention 1) and with pruning."""
    cells = {(r["part"], r["loss"], r["rows"], r["retention"]): r for r in results}
    lines = []
    for part, name, rows, retention in cells:
        for other in BASELINES if name == "ours" else ():
            whole, own = cells.get((part, other, rows, 1.0)), cells[part, name, rows, retention]
            if whole and whole["peak_bytes"] and own["peak_bytes"]:
                line = {"part": part, "N": rows, "retention": retention, "against": other}
                for name_of, field in RATIOS.items():
                    line[name_of] = own[field] / whole[field]
                lines.append(line)
    return lines


if __name__ == "__main__":
    main()
