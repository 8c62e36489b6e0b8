"""Everything that is set around vLLM because of how it behaves today, and until when.

Written for vLLM 0.32. Each entry says why it is there and when it can go.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_GIB = 1 << 30
CPU_KV_CACHE_BYTES = 1 * _GIB


@dataclass(frozen=True)
class Variable:
    """An environment variable that must be set before vllm is imported."""

    name: str
    value: str
    why: str
    until: str
    forced: bool  # False: a value that is already set stays


class Replica(Protocol):
    """What the settings depend on: a replica's part of the spec."""

    @property
    def num_cpus(self) -> int: ...
    @property
    def num_gpus(self) -> int: ...
    @property
    def tensor_parallel(self) -> int: ...


def _variables(replica: Replica) -> list[Variable]:
    threads = max(1, replica.num_cpus // replica.tensor_parallel)
    always = [
        Variable(
            "VLLM_ENABLE_V1_MULTIPROCESSING",
            "0",
            "the engine core runs in the actor's process: weights arrive without being pickled",
            "LLMEngine takes the mode as an argument that wins over the environment",
            forced=True,
        ),
        Variable(
            "VLLM_USE_V2_MODEL_RUNNER",
            "0",
            "model runner V2, the default where Triton is present, refuses V1 logits processors",
            "the recorder is ported to V2's processors (vllm.v1.worker.gpu.sample)",
            forced=True,
        ),
        Variable(
            "VLLM_NO_USAGE_STATS",
            "1",
            "vLLM reports to a server of its own; clusters without a way out stall on it",
            "reporting is opt-in",
            forced=False,
        ),
        Variable(
            "VLLM_LOGGING_LEVEL",
            "ERROR",
            "at WARNING each engine writes a page into the run's log",
            "never: a choice",
            forced=False,
        ),
    ]
    on_cpu = [
        Variable(
            "OMP_NUM_THREADS",
            str(threads),
            "vLLM's kernels and its worker processes take the machine's count, not the actor's",
            "the CPU backend has a setting for it",
            forced=True,
        ),
        Variable(
            "VLLM_CPU_OMP_THREADS_BIND",
            "nobind",
            "auto binds every engine of a machine to the same cores",
            "vLLM binds by what other processes have left",
            forced=False,
        ),
        Variable(
            "TORCHDYNAMO_DISABLE",
            "1",
            "sampled log-probabilities call a compiled function, which needs a C++ compiler",
            "CpuPlatform.simple_compile_backend is eager under enforce_eager",
            forced=False,
        ),
    ]
    return always + (on_cpu if replica.num_gpus == 0 else [])


def prepare_process(replica: Replica) -> None:
    """Set the environment and the threads; call it before the first import of vllm."""
    for variable in _variables(replica):
        if variable.forced or variable.name not in os.environ:
            os.environ[variable.name] = variable.value
    if replica.num_gpus == 0:
        # vLLM forbids torch.set_num_threads once a CPU worker is up.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if "torch._dynamo" in sys.modules and os.environ["TORCHDYNAMO_DISABLE"] == "1":
            # The variable is read when torch._dynamo is imported, which has happened already.
            torch._dynamo.config.disable = True


def repack_heads(model: torch.nn.Module) -> None:
    """Make LM heads use the weights that they have; call it after every reload on the CPU.

    A tied head shares the embedding's parameter, which a reload fills, but keeps its own packed
    copy of the old values, with which it went on computing. Until vLLM's layerwise reload
    processes layers that share another layer's parameters.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)


def cpu_engine_args(batched_tokens: int) -> dict[str, Any]:
    """Defaults of the CPU backend; the spec's engine_args win over them.

    Args:
        batched_tokens: of one step; at least the longest prompt, which is not cut into chunks.
    """
    defaults: dict[str, Any] = {
        "enforce_eager": True,  # compiling takes minutes and a compiler, and gains little
        # Per-request seeds crash with chunked prefill ("CPU Generator does not use offset"),
        # until vLLM rewinds a CPU generator in another way. Without chunks a prompt must fit.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": batched_tokens,
    }
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # Otherwise vLLM claims a share of the whole machine's memory.
        defaults["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    return defaults
