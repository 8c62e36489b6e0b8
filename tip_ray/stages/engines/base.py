"""What a rollout engine is: token ids in, finished responses out, one at a time.

K  width of the recorded support        m  response tokens, the final EOS included
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Request:
    """One response to make."""

    index: int  # the caller's own number
    prompt_ids: Sequence[int]
    seed: int  # 63 bits
    max_response_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    record: bool  # whether a Trace is wanted


@dataclass(frozen=True)
class Trace:
    """The decode's own numbers at temperature 1 over the shared vocabulary, in nats."""

    logprob: npt.NDArray[np.float32]  # [m]; of the sampled token
    entropy: npt.NDArray[np.float32]  # [m]
    topk_ids: npt.NDArray[np.int32]  # [m, K]; most probable first
    topk_logprobs: npt.NDArray[np.float32]  # [m, K]
    tail_logprob: npt.NDArray[np.float32]  # [m]; logsumexp over the complement, -inf if K = V


@dataclass(frozen=True)
class Finished:
    """One finished response."""

    index: int
    response_ids: npt.NDArray[np.int32]  # [m]
    finish_reason: str  # stop | length
    trace: Trace | None


@dataclass(frozen=True)
class EngineConfig:
    """What every engine needs to know; `path` is a local checkpoint directory."""

    path: str
    dtype: str
    trust_remote_code: bool
    vocab_size: int  # shared vocabulary: ids at or above it are never sampled nor counted
    k: int
    eos_ids: tuple[int, ...]
    max_model_tokens: int
    num_cpus: int
    num_gpus: int
    tensor_parallel: int
    gpu_memory_utilization: float
    engine_args: dict[str, Any]


class Engine(Protocol):
    """Empty between calls of `generate`: weights change only then."""

    def generate(self, requests: Sequence[Request]) -> Generator[list[Finished], None, None]:
        """Yield responses as they finish; every request comes back exactly once.

        Closing the generator before its end aborts what is unfinished.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights (Hugging Face names) and forget every cached prefix."""
        ...

    def close(self) -> None:
        """Free the device and end worker processes; the engine is unusable afterwards."""
        ...
