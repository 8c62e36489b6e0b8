"""ROLLOUTS tables for the teacher, and what its answers have to be: dense float64 forwards.

N  response tokens    V  shared vocabulary    K  support    J  support and tail
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from tip_ray.contract import tables
from tip_ray.contract.spec import TeacherSpec
from tip_ray.stages.teacher import TeacherActor

FLOOR = -30.0
STUDENT_ROWS, TEACHER_ROWS = 29, 32  # padded heads of different sizes
V = 29
CLOSE_NATS = 2e-4  # two trunks, float32
# vLLM's attention on the CPU needs heads of 32.
VLLM_LLAMA: dict[str, Any] = {
    "kind": "llama",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 8192,
}
# (prompt, response) tokens of each row
LENGTHS = ((3, 5), (1, 1), (9, 12), (4, 0), (2, 7), (6, 3), (1, 12))


@functools.cache
def reference(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def dense_logprobs(path: str, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[m, V] float64, over the shared vocabulary, one row at a time."""
    with torch.no_grad():
        logits_LV = reference(path)(torch.tensor([prompt + response])).logits[0]
    return logits_LV[len(prompt) - 1 : len(prompt) + len(response) - 1, :V].log_softmax(-1)


def top_k(logprobs_NV: torch.Tensor, k: int) -> tuple[Any, Any, Any]:
    """Ids, log-probabilities and the complement's log-mass."""
    values_NK, ids_NK = logprobs_NV.topk(k, dim=-1)
    return ids_NK, values_NK, outside(logprobs_NV, ids_NK)


def outside(logprobs_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Log-mass of the ids that are not named, by brute force."""
    tails = []
    for row, ids in zip(logprobs_NV, ids_NK.tolist(), strict=True):
        others = [i for i in range(len(row)) if i not in ids]
        tails.append(row[others].exp().sum().log() if others else torch.tensor(-torch.inf))
    return torch.stack(tails).double() if tails else torch.zeros(0, dtype=torch.float64)


def kl(p_NJ: torch.Tensor, q_NJ: torch.Tensor) -> torch.Tensor:
    return (p_NJ.exp() * (p_NJ - q_NJ)).sum(-1)


@functools.cache
def rollouts(
    student: str,
    k: int,
    own_prompts: bool = False,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    vocab_size: int = V,
) -> pa.Table:
    """ROLLOUTS with the student's true numbers; some tokens are not loss tokens."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for slot, (prompt_tokens, response_tokens) in enumerate(lengths):
        prompt = rng.integers(0, vocab_size, prompt_tokens).tolist()
        response = rng.integers(0, vocab_size, response_tokens).tolist()
        logprobs_NV = dense_logprobs(student, prompt, response)
        ids_NK, values_NK, tail_N = top_k(logprobs_NV, k)
        sampled = torch.tensor(response, dtype=torch.int64)[:, None]
        rows.append(
            {
                "step": 7,
                "slot": slot,
                "sample_index": slot % 2,
                "attempt": 0,
                "prompt_uid": f"p{slot}",
                "prompt_ids": prompt,
                "teacher_prompt_ids": [1, 2, *prompt] if own_prompts and slot % 2 else None,
                "response_ids": response,
                "loss_mask": [int(i != 2) for i in range(response_tokens)],
                "student_logprob": logprobs_NV.gather(1, sampled)[:, 0].tolist(),
                "student_entropy": -(logprobs_NV.exp() * logprobs_NV).sum(-1).numpy(),
                "student_topk_ids": ids_NK.tolist(),
                "student_topk_logprobs": values_NK.tolist(),
                "student_tail_logprob": tail_N.tolist(),
                "weight_version": 0,
                "finish_reason": "stop",
                "reward": None,
            }
        )
    names = tables.rollouts_schema(k).names
    columns = {name: [row[name] for row in rows] for name in names}
    return tables.build(tables.rollouts_schema(k), columns)


def actor(path: str, k: int = 4, source: str = "student", **spec: Any) -> TeacherActor:
    settings = {"model": path, "dtype": "float32", "max_batch_tokens": 40, "chunk_rows": 3}
    return TeacherActor(TeacherSpec(**{**settings, **spec}), path, V, k, source, FLOOR, 64)


def row_values(table: pa.Table, name: str, row: int) -> np.ndarray:
    starts = tables.offsets(table, name)
    return tables.column(table, name)[starts[row] : starts[row + 1]]


def check_against_dense(table: pa.Table, k: int, teacher: str, scores: Any, targets: Any) -> None:
    """Every column of SCORES and of TARGETS on the student's support."""
    for row, given in enumerate(table.to_pylist()):
        prompt = given["teacher_prompt_ids"] or given["prompt_ids"]
        dense_NV = dense_logprobs(teacher, prompt, given["response_ids"])
        mask_N = np.array(given["loss_mask"], bool)
        ids_NK = torch.tensor(given["student_topk_ids"], dtype=torch.int64).reshape(-1, k)
        ids_NK[~mask_N] = 0
        loss_NK = ids_NK[mask_N]
        on_NK, tail_N = dense_NV.gather(1, ids_NK), outside(dense_NV, ids_NK)

        def close(table: pa.Table, name: str, expected: Any, row: int = row) -> None:
            got = row_values(table, name, row)
            np.testing.assert_allclose(
                got, np.asarray(expected), atol=3e-5, rtol=1e-5, err_msg=name
            )

        assert (row_values(targets, "support_ids", row)[mask_N] == loss_NK.numpy()).all()
        close(targets, "teacher_logprobs", on_NK)
        close(targets, "teacher_tail_logprob", tail_N)
        sampled_N1 = torch.tensor(given["response_ids"], dtype=torch.int64)[:, None]
        close(targets, "teacher_sampled_logprob", dense_NV.gather(1, sampled_N1)[:, 0])
        top_N5, top_ids_N5 = dense_NV.topk(tables.TOP_SHOWN)
        close(targets, "teacher_top_logprobs", top_N5)
        assert (row_values(targets, "teacher_top_ids", row) == top_ids_N5.numpy()).all()

        student_NJ = torch.tensor(
            [
                [*values, max(tail, FLOOR)]
                for values, tail in zip(
                    given["student_topk_logprobs"], given["student_tail_logprob"], strict=True
                )
            ],
            dtype=torch.float64,
        ).reshape(-1, k + 1)
        teacher_NJ = torch.cat([on_NK, tail_N.clamp(min=FLOOR)[:, None]], dim=1)
        entropy_N = -(dense_NV.exp() * dense_NV).sum(-1)
        close(scores, "reverse_kl", kl(student_NJ, teacher_NJ).numpy() * mask_N)
        close(scores, "forward_kl", kl(teacher_NJ, student_NJ).numpy() * mask_N)
        close(scores, "teacher_entropy", entropy_N.numpy() * mask_N)
        close(scores, "student_entropy", np.array(given["student_entropy"]) * mask_N)
        assert row_values(scores, "loss_mask", row).tolist() == given["loss_mask"]


def dense_hidden(path: str, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[m, D] float64 states after the final norm that predict the response, one row at a time."""
    with torch.no_grad():
        hidden_LD = reference(path).base_model(torch.tensor([prompt + response]))[0][0]
    return hidden_LD[len(prompt) - 1 : len(prompt) + len(response) - 1]


def assert_rounded(bits_ND: np.ndarray, exact_ND: torch.Tensor, close: float = 1e-5) -> None:
    """Bits of bfloat16, of what lies `close` to `exact_ND`, rounded to the nearest."""
    found_ND = torch.tensor(bits_ND).view(torch.bfloat16).double()
    assert ((found_ND - exact_ND).abs() <= 2**-8 * exact_ND.abs() + 1.01 * close).all()


def assert_same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    """Every column of SCORES and of TARGETS, with the same rows in the same order."""
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert one.schema == other.schema
        assert one.num_rows > 0
        assert tables.keys(one) == tables.keys(other)
        for name in one.schema.names[len(tables.KEY_COLUMNS) :]:
            found, expected = tables.column(one, name), tables.column(other, name)
            if np.issubdtype(found.dtype, np.integer):
                assert (found == expected).all(), name
            np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE_NATS, err_msg=name)
    header, expected = ours[0], theirs[0]
    assert header.keys == expected.keys
    assert header.quarantined == expected.quarantined == ()
    assert header.loss_tokens == expected.loss_tokens
    assert header.teacher_mass_sum == pytest.approx(expected.teacher_mass_sum, rel=1e-4)
