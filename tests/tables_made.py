"""Tables with made-up but consistent contents, for tests of what lies between the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tip_ray.contract import tables


@dataclass
class MadeStep:
    """One step's rollouts, scores and targets, row by row."""

    rollouts: pa.Table
    scores: pa.Table
    targets: pa.Table


def made_step(
    rng: np.random.Generator,
    *,
    rows: int = 6,
    k: int = 4,
    width: int | None = None,
    step: int = 1,
    masked: bool = True,
    vocab_size: int = 50,
    targets: tables.Targets = "topk",
    lengths: tuple[int, int] | None = None,
) -> MadeStep:
    """`rows` rollouts of 1 to 9 response tokens after prompts of 1 to 5, or of just `lengths`."""
    width = width or k
    sizes = [lengths or (rng.integers(1, 6), rng.integers(1, 10)) for _ in range(rows)]
    prompt = [rng.integers(0, vocab_size, size).tolist() for size, _ in sizes]
    response = [rng.integers(0, vocab_size, size).tolist() for _, size in sizes]
    mask = [
        (rng.random(len(row)) > 0.3).astype(int).tolist() if masked else [1] * len(row)
        for row in response
    ]
    key = {
        "step": [step] * rows,
        "slot": [row // 2 for row in range(rows)],
        "sample_index": [row % 2 for row in range(rows)],
        "attempt": [0] * rows,
        "prompt_uid": [f"uid-{row // 2}" for row in range(rows)],
    }

    def floats() -> list[list[float]]:
        return [rng.random(len(row)).astype(np.float32).tolist() for row in response]

    def wide(count: int) -> list[list[list[float]]]:
        return [(-rng.random((len(row), count))).tolist() for row in response]

    def ids(count: int) -> list[list[list[int]]]:
        return [
            [rng.permutation(vocab_size)[:count].tolist() for _ in range(len(row))]
            for row in response
        ]

    student_entropy = floats()
    rollouts = tables.build(
        tables.rollouts_schema(k),
        {
            **key,
            "prompt_ids": prompt,
            "teacher_prompt_ids": [None] * rows,
            "response_ids": response,
            "loss_mask": mask,
            "student_logprob": floats(),
            "student_entropy": student_entropy,
            "student_topk_ids": ids(k),
            "student_topk_logprobs": wide(k),
            "student_tail_logprob": floats(),
            "weight_version": [step - 1] * rows,
            "finish_reason": ["stop"] * rows,
            "reward": [None] * rows,
        },
    )
    scores = tables.build(
        tables.SCORES,
        {
            **key,
            "student_entropy": student_entropy,
            "reverse_kl": floats(),
            "forward_kl": floats(),
            "teacher_entropy": floats(),
            "loss_mask": mask,
        },
    )
    if targets == "hidden":
        bits = [rng.integers(0, 2**16, (len(row), width)).tolist() for row in response]
        compared: dict[str, Any] = {"teacher_hidden": bits}
    else:
        compared = {
            "support_ids": ids(width),
            "teacher_logprobs": wide(width),
            "teacher_tail_logprob": floats(),
        }
    made_targets = tables.build(
        tables.targets_schema(width, targets),
        {
            **key,
            **compared,
            "teacher_sampled_logprob": floats(),
            "teacher_top_ids": ids(tables.TOP_SHOWN),
            "teacher_top_logprobs": wide(tables.TOP_SHOWN),
        },
    )
    return MadeStep(rollouts, scores, made_targets)


def keep_of(rollouts: pa.Table, kept: dict[tables.Key, list[int]], ranks: int = 1) -> pa.Table:
    """KEEP with some positions of some rows; row after row on another rank."""
    rows = {key: row for row, key in enumerate(tables.keys(rollouts)) if key in kept}
    order = list(rows.values())
    columns: dict[str, Any] = {name: rollouts[name].take(order) for name in tables.KEY_COLUMNS}
    masks = rollouts.column("loss_mask").to_pylist()
    columns |= {
        "kept": [kept[key] for key in rows],
        "weight": [[0.5] * len(kept[key]) for key in rows],
        "rank": [row % ranks if kept[key] else -1 for row, key in enumerate(rows)],
        "quadrant": [masks[row] for row in rows.values()],
        "shown": [0] * len(rows),
    }
    return tables.build(tables.KEEP, columns)


def row_tokens(rollouts: pa.Table) -> dict[tables.Key, int]:
    """Prompt and response tokens by key."""
    return {
        key: len(row["prompt_ids"]) + len(row["response_ids"])
        for key, row in zip(tables.keys(rollouts), rollouts.to_pylist(), strict=True)
    }
