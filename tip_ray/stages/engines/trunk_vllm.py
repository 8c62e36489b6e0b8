"""vLLM as the teacher's trunk: its pooling runner gives the final-norm hidden state of every token.

N  response tokens    D  width of a hidden state    V  shared vocabulary
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tip_ray.contract.spec import TeacherSpec
from tip_ray.stages.engines.trunk import HiddenStates, Row
from tip_ray.stages.engines.vllm_args import (
    check_devices,
    check_engine_args,
    values_checked_by_vllm,
)
from tip_ray.stages.engines.workarounds import cpu_engine_args, prepare_process
from tip_ray.stages.head_weight import head_weight

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

FIELD = "teacher.engine_args"
_TASK = "token_embed"

# Decided by another field of the spec.
ELSEWHERE = {
    "model": "set teacher.model",
    "revision": "set teacher.revision",
    "dtype": "set teacher.dtype",
    "trust_remote_code": "set teacher.trust_remote_code",
    "tensor_parallel_size": "set teacher.tensor_parallel",
    "max_model_len": "it follows rollout.max_prompt_tokens and max_response_tokens",
}

# Would lose or change hidden states.
INEXACT = {
    "enable_prefix_caching": "a cached token has no hidden state",
    "runner": "the engine runs the trunk alone",
    "convert": "the engine runs the trunk alone",
    "pooler_config": "every token's hidden state is needed as it is",
    "enable_lora": "the teacher is its checkpoint",
    "logits_processors": "the head is not the engine's",
    "speculative_config": "nothing is generated",
    "generation_config": "nothing is generated",
    "distributed_executor_backend": "it follows teacher.tensor_parallel",
    "pipeline_parallel_size": "use teacher.tensor_parallel",
    "data_parallel_size": "use teacher.replicas",
    "decode_context_parallel_size": "use teacher.tensor_parallel",
    "prefill_context_parallel_size": "use teacher.tensor_parallel",
    "nnodes": "a replica is one actor on one machine",
}


class VllmTrunk:
    """Implements `Trunk`, in the actor's own process; above one device, in worker processes.

    Raises:
        SpecError: engine_args do not fit, this vLLM is not built for the replica's devices, or
            the checkpoint has no plain linear head.
    """

    def __init__(
        self, teacher: TeacherSpec, path: str, vocab_size: int, max_row_tokens: int
    ) -> None:
        prepare_process(teacher)
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        self.max_row_tokens = max_row_tokens
        args = build_trunk_args(teacher, path, max_row_tokens)
        self.head_VD = head_weight(
            path,
            teacher.dtype,
            slice(vocab_size),
            teacher.trust_remote_code,
            "teacher.model",
            "use teacher.engine transformers",
        ).to("cuda" if teacher.num_gpus else "cpu")
        with values_checked_by_vllm(FIELD, teacher.engine_args):
            settings = args.create_engine_config(UsageContext.LLM_CLASS)
            self._engine = LLMEngine.from_vllm_config(
                settings, usage_context=UsageContext.LLM_CLASS, disable_log_stats=True
            )
        self._numbers = itertools.count()

    def hidden_states(self, rows: Sequence[Row]) -> HiddenStates:
        """One step of the engine after the other, longest rows first; leaving early aborts."""
        pending: dict[str, int] = {}
        try:
            for index in sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids)):
                name = str(next(self._numbers))
                pending[name] = index
                prompt = {"prompt_token_ids": rows[index].input_ids.tolist()}
                self._engine.add_request(name, prompt, self._pooling())
            while pending:
                indices, hidden_ND = self._step(rows, pending)
                if indices:
                    yield indices, hidden_ND
        finally:
            if pending:
                self._engine.abort_request(list(pending))

    def close(self) -> None:
        """Free the model and end worker processes."""
        self._engine.engine_core.shutdown()

    def _step(self, rows: Sequence[Row], pending: dict[str, int]) -> tuple[list[int], Tensor]:
        """Rows that are finished, and copies of what their responses need of all the states."""
        indices, parts = [], [self.head_VD.new_empty((0, self.head_VD.shape[1]))]
        for output in self._engine.step():
            if output.finished:
                index = pending.pop(output.request_id)
                hidden_TD = output.outputs.data
                assert len(hidden_TD) == len(rows[index].input_ids), "hidden states are missing"
                indices.append(index)
                parts.append(hidden_TD[-rows[index].response_tokens :].to(self.head_VD))
        return indices, torch.cat(parts)

    def _pooling(self) -> Any:
        from vllm import PoolingParams

        return PoolingParams(task=_TASK, use_activation=False)


def build_trunk_args(teacher: TeacherSpec, path: str, max_row_tokens: int) -> EngineArgs:
    """vLLM's EngineArgs for the trunk of `teacher`.

    Raises:
        SpecError: an engine arg is unknown, set elsewhere in the spec, or breaks exactness; or
            this vLLM is not built for the replica's devices.
    """
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import EngineArgs

    check_engine_args(FIELD, teacher.engine_args, ELSEWHERE, INEXACT)
    on_cpu = check_devices("teacher.num_gpus", teacher.num_gpus)
    batched_tokens = max(max_row_tokens, teacher.max_batch_tokens)
    args = {
        "model": path,
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": PoolerConfig(task=_TASK, tok_pooling_type="ALL", use_activation=False),
        "skip_tokenizer_init": True,  # token ids in
        "dtype": teacher.dtype,
        "trust_remote_code": teacher.trust_remote_code,
        "max_model_len": max_row_tokens,
        # A whole row in one forward, as with transformers: chunks would be computed one by one.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": batched_tokens,
        # Nobody reads it: token_embed skips the cache, since cached tokens give no hidden state.
        "enable_prefix_caching": False,
        "tensor_parallel_size": teacher.tensor_parallel,
        # Named, since vLLM takes Ray inside a placement group, which refuses several GPUs a bundle.
        "distributed_executor_backend": "mp" if teacher.tensor_parallel > 1 else "uni",
        "disable_log_stats": True,
        "load_format": "safetensors",  # a pickle runs code when it is opened
        "use_tqdm_on_load": False,
    }
    defaults = cpu_engine_args(batched_tokens) if on_cpu else {}
    return EngineArgs(**args | defaults | teacher.engine_args)
