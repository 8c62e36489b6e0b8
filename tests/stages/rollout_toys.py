"""Toy students for the engines, and what a trace has to be: a dense float32 forward in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.stages.toys import save_model
from tip_ray.stages.engines.base import Engine, EngineConfig, Finished, Request

HEAD_ROWS, VOCAB, K = 64, 60, 8  # the head has 4 rows beyond the shared vocabulary
EOS_IDS = (3, 5)
TOLERANCE_NATS = 1e-4  # float32 against float64 of the same float32 logits: 1e-5 is measured


def save_student(path: Path, kind: str = "qwen3", seed: int = 0, **changes: Any) -> str:
    """A toy checkpoint whose 4 padding rows of the head would often win, were they not masked."""
    settings = {
        "vocab_size": HEAD_ROWS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "eos_token_id": EOS_IDS[0],
        "tie_word_embeddings": kind == "qwen3",
    }
    # vLLM's CPU attention needs heads of a multiple of 32.
    settings |= {"head_dim": 32} if kind == "qwen3" else {"num_attention_heads": 2}
    save_model(path, seed=seed, kind=kind, **{**settings, **changes})
    if not settings["tie_word_embeddings"]:
        model = reference_model(path)
        with torch.no_grad():
            model.lm_head.weight[VOCAB:] = 3 * model.lm_head.weight[: HEAD_ROWS - VOCAB]
        model.save_pretrained(path)
    return str(path)


def reference_model(path: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def config(path: str, **changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "path": path,
        "dtype": "float32",
        "trust_remote_code": False,
        "vocab_size": VOCAB,
        "k": K,
        "eos_ids": EOS_IDS,
        "max_model_tokens": 256,
        "num_cpus": 1,
        "num_gpus": 0,
        "tensor_parallel": 1,
        "gpu_memory_utilization": 0.9,
        "engine_args": {},
    }
    return EngineConfig(**{**settings, **changes})


@contextmanager
def opened(engine: Engine) -> Iterator[Engine]:
    """`engine`, closed in the end: two in-process vLLM engines share their process groups."""
    try:
        yield engine
    finally:
        engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(6, VOCAB, length).tolist()


def request(index: int, prompt_ids: Sequence[int], **changes: Any) -> Request:
    settings: dict[str, Any] = {
        "seed": (index + 1) * 10**17 + 11,
        "max_response_tokens": 24,
        "temperature": 1.0,
        "top_p": 1.0,
        "record": True,
    }
    return Request(index=index, prompt_ids=prompt_ids, **{**settings, **changes})


def by_index(batches: Iterable[list[Finished]]) -> dict[int, Finished]:
    rows = [one for batch in batches for one in batch]
    found = {one.index: one for one in rows}
    assert len(found) == len(rows), "a request came back twice"
    return found


def reference_logprobs(model: PreTrainedModel, ids: Sequence[int], prompt_length: int) -> Any:
    """[m, shared V] of the response in `ids`, from one dense forward."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits_TV[prompt_length - 1 : -1, :VOCAB].double().log_softmax(-1)


def assert_trace(
    model: PreTrainedModel, asked: Request, done: Finished, tolerance: float = TOLERANCE_NATS
) -> None:
    """Every number of the trace, against the dense forward on prompt and response."""
    trace, response_ids = done.trace, done.response_ids
    assert trace is not None
    assert 1 <= len(response_ids) <= asked.max_response_tokens
    ids = [*asked.prompt_ids, *response_ids.tolist()]
    logprobs_mV = reference_logprobs(model, ids, len(asked.prompt_ids))
    sampled_m = logprobs_mV.gather(1, torch.from_numpy(response_ids).long()[:, None]).squeeze(1)
    entropy_m = -(logprobs_mV.exp() * logprobs_mV).sum(-1)
    topk_ids_mK = torch.from_numpy(trace.topk_ids).long()
    rest_mV = logprobs_mV.scatter(1, topk_ids_mK, float("-inf"))
    close = {"rtol": 0, "atol": tolerance}
    np.testing.assert_allclose(trace.logprob, sampled_m, **close)
    np.testing.assert_allclose(trace.entropy, entropy_m, **close)
    np.testing.assert_allclose(trace.topk_logprobs, logprobs_mV.gather(1, topk_ids_mK), **close)
    np.testing.assert_allclose(trace.topk_logprobs, logprobs_mV.topk(K).values, **close)
    np.testing.assert_allclose(trace.tail_logprob, rest_mV.logsumexp(-1), **close)
    assert trace.topk_ids.shape == (len(response_ids), K)


def assert_ending(asked: Request, done: Finished) -> None:
    """The end token is part of the response, stands only at its end, and gives the reason."""
    ends = np.isin(done.response_ids, EOS_IDS)
    assert not ends[:-1].any()
    assert done.finish_reason == ("stop" if ends[-1] else "length")
    if not ends[-1]:
        assert len(done.response_ids) == asked.max_response_tokens
    assert done.response_ids.max() < VOCAB


def assert_greedy(model: PreTrainedModel, asked: Request, done: Finished) -> None:
    """Each token is the most probable one after the tokens before it, to float noise."""
    ids = [*asked.prompt_ids, *done.response_ids.tolist()]
    logprobs_mV = reference_logprobs(model, ids, len(asked.prompt_ids))
    sampled_m = logprobs_mV.gather(1, torch.from_numpy(done.response_ids).long()[:, None])
    assert (logprobs_mV.max(-1).values - sampled_m.squeeze(1)).max() < TOLERANCE_NATS
