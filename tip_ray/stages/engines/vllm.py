"""vLLM as a rollout engine, in the actor's own process; the same code on CPU and GPU.

m  response tokens, the final EOS included
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tip_ray.contract.errors import ModelMismatchError, ReplicaError, SpecError
from tip_ray.stages.engines.base import EngineConfig, Finished, Request
from tip_ray.stages.engines.vllm_args import FIELD, build_engine_args, values_checked_by_vllm
from tip_ray.stages.engines.workarounds import prepare_process

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - node-local memory, not a temporary directory


class VllmEngine:
    """Implements `Engine`.

    Raises:
        SpecError: engine_args do not fit; see `build_engine_args`.
    """

    def __init__(self, config: EngineConfig) -> None:
        prepare_process(config)
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        self._config = config
        args = build_engine_args(config)
        with values_checked_by_vllm(FIELD, config.engine_args):
            settings = args.create_engine_config(UsageContext.LLM_CLASS)
        self._engine = LLMEngine.from_vllm_config(
            settings, usage_context=UsageContext.LLM_CLASS, disable_log_stats=True
        )
        self._chunked_on_cpu = (
            config.num_gpus == 0 and settings.scheduler_config.enable_chunked_prefill
        )
        self._weight_names = _weight_names(
            config.path, tied=settings.model_config.hf_text_config.tie_word_embeddings
        )
        self._numbers = itertools.count()

    def generate(self, requests: Sequence[Request]) -> Generator[list[Finished], None, None]:
        """Yield responses as they finish; leaving early aborts the rest."""
        pending: dict[str, Request] = {}
        try:
            for request in requests:
                name = str(next(self._numbers))
                pending[name] = request
                prompt = {"prompt_token_ids": [int(one) for one in request.prompt_ids]}
                self._engine.add_request(name, prompt, self._sampling(request, int(name)))
            while pending:
                outputs = [output for output in self._engine.step() if output.finished]
                if outputs:
                    yield self._finish(outputs, pending)
        finally:
            if pending:
                self._engine.abort_request(list(pending))
                self._rpc("tip_ray_discard", [int(name) for name in pending])

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """One reload a version; the engine must be empty.

        Raises:
            ReplicaError: responses are being made.
            ModelMismatchError: a weight of the checkpoint was left out; vLLM would keep the old.
        """
        if self._engine.has_unfinished_requests():
            raise ReplicaError("rollout engine: weights may only change when it is empty")
        missing = set(self._weight_names)
        source = _ticked_off(tensors, missing)
        if self._config.tensor_parallel == 1:
            self._rpc("tip_ray_reload", source)
        else:
            self._reload_through_file(source)
        if missing:
            raise ModelMismatchError(f"weights: no values for the student's {min(missing)}")
        # Cached prefixes were computed with the old weights.
        if not self._engine.reset_prefix_cache():
            raise ReplicaError("rollout engine: the prefix cache could not be reset")

    def close(self) -> None:
        """Free the model and end worker processes; the engine is unusable afterwards."""
        self._engine.engine_core.shutdown()

    def _finish(
        self, outputs: Sequence[RequestOutput], pending: dict[str, Request]
    ) -> list[Finished]:
        done = [(output, pending.pop(output.request_id)) for output in outputs]
        wanted = [
            (int(output.request_id), len(output.outputs[0].token_ids))
            for output, request in done
            if request.record
        ]
        recorded = iter(self._rpc("tip_ray_take", wanted) if wanted else ())
        finished = []
        for output, request in done:
            completion, trace = output.outputs[0], None
            if completion.finish_reason not in ("stop", "length"):
                raise ReplicaError(f"rollout engine: vLLM ended with {completion.finish_reason}")
            if request.record:
                sampled_logit = np.array(completion.logprobs.logprobs, np.float32)
                trace = next(recorded).trace(sampled_logit)
            response_ids = np.array(completion.token_ids, np.int32)
            finished.append(Finished(request.index, response_ids, completion.finish_reason, trace))
        return finished

    def _sampling(self, request: Request, number: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from tip_ray.stages.engines.recorder import RECORDING

        greedy = request.temperature == 0
        if self._chunked_on_cpu and not greedy:
            raise SpecError(
                f"{FIELD}.enable_chunked_prefill",
                "True",
                "False on the CPU with temperature above 0",
                "per-request seeds fail there",
            )
        return SamplingParams(
            max_tokens=request.max_response_tokens,
            temperature=request.temperature,
            top_p=1.0 if greedy else request.top_p,
            seed=None if greedy else request.seed,
            stop_token_ids=list(self._config.eos_ids),
            ignore_eos=True,  # stop at eos_ids and nothing else
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            logprobs=0 if request.record else None,  # the sampled token's raw logit
            flat_logprobs=True,
            extra_args={RECORDING: number} if request.record else None,
        )

    def _reload_through_file(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Workers are processes: an iterator would be pickled to each, memory is shared."""
        base = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
        folder = tempfile.mkdtemp(prefix="tip-ray-weights-", dir=base)
        try:
            named = {name: tensor.contiguous() for name, tensor in tensors}
            save_file(named, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            self._rpc("tip_ray_reload", folder)
        finally:
            shutil.rmtree(folder)

    def _rpc(self, method: str, argument: Any) -> Any:
        """The first rank's answer."""
        return self._engine.collective_rpc(method, args=(argument,))[0]


def _weight_names(path: str, *, tied: bool) -> set[str]:
    """Names of a checkpoint's weights; of a tied pair only the embedding counts."""
    names: set[str] = set()
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names - {"lm_head.weight"} if tied else names


def _ticked_off(
    tensors: Iterable[tuple[str, torch.Tensor]], missing: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        missing.discard(name)
        yield name, tensor
