"""transformers as a rollout engine: plain batched decoding, reproducible bit for bit on a CPU.

A batch holds prompts of about equal length, padded on the left. Every request draws from its own
generator, so what it is batched with changes its logits by float noise only.

R  rows still in the batch    V  width of the logits    T  positions of the cache
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from tip_ray.compute.divergence import row_statistics
from tip_ray.contract.errors import ModelMismatchError, SpecError
from tip_ray.stages.engines.base import EngineConfig, Finished, Request
from tip_ray.stages.engines.sampling import sample
from tip_ray.stages.engines.trace_buffer import TraceBuffer
from tip_ray.stages.models import load_causal_lm

# What rollout.engine_args may hold, with defaults.
ENGINE_ARGS = {"max_batch_tokens": 32768}  # positions of one batch's cache


class TransformersEngine:
    """Implements `Engine`.

    Raises:
        SpecError: an engine arg is unknown, or the replica has more than one device.
    """

    def __init__(self, config: EngineConfig) -> None:
        args = _engine_args(config)
        self._config = config
        self._max_batch_tokens: int = args["max_batch_tokens"]
        self._device = torch.device("cuda" if config.num_gpus else "cpu")
        self._model = load_causal_lm(
            config.path, config.dtype, config.trust_remote_code, field="student.model"
        )
        self._model.to(self._device)

    def generate(self, requests: Sequence[Request]) -> Generator[list[Finished], None, None]:
        """Yield responses as they finish, batch after batch, shortest prompts first."""
        for batch in batches(requests, self._max_batch_tokens):
            yield from self._decode(batch)

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy into the model's parameters; nothing is cached between calls of `generate`.

        Raises:
            ModelMismatchError: a name is unknown, has another shape, or a parameter was left out.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        distinct = {id(parameter) for parameter in parameters.values()}
        for name, tensor in tensors:
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ModelMismatchError(f"weights: the student has no {name} {list(tensor.shape)}")
            parameters[name].copy_(tensor)
            distinct.discard(id(parameters[name]))
        if distinct:
            left = next(name for name, one in parameters.items() if id(one) in distinct)
            raise ModelMismatchError(f"weights: no values for the student's {left}")

    def close(self) -> None:
        """Free the model; the engine is unusable afterwards."""
        del self._model

    def _decode(self, batch: Sequence[Request]) -> Iterator[list[Finished]]:
        # Not a decorated generator: inference mode must not stay on while the consumer runs.
        state = _Batch(self._model, self._config, self._device, batch)
        while state.rows:
            with torch.inference_mode():
                finished = state.step()
            if finished:
                yield finished


class _Batch:
    """Some requests that are decoded in lockstep; rows leave as they finish."""

    def __init__(
        self, model: Any, config: EngineConfig, device: torch.device, batch: Sequence[Request]
    ) -> None:
        self._model, self._config, self._device = model, config, device
        self._cache = DynamicCache(config=model.config)
        self._buffer = TraceBuffer(config.k, device)
        self.rows = list(range(len(batch)))  # of `batch`, those still in
        self._requests = batch
        self._response_ids: list[list[int]] = [[] for _ in batch]
        self._sampled_logits: list[list[float]] = [[] for _ in batch]
        self._uniforms = [_uniforms(request) for request in batch]
        width = max(len(request.prompt_ids) for request in batch)
        padding = [width - len(request.prompt_ids) for request in batch]
        ids = [[0] * pad + list(one.prompt_ids) for pad, one in zip(padding, batch, strict=True)]
        self._input_ids_RT = torch.tensor(ids, device=device)
        self._padding_R = torch.tensor(padding, device=device)

    def step(self) -> list[Finished]:
        """One token for every row."""
        logits_RV = self._forward()
        requests = [self._requests[row] for row in self.rows]
        position = len(self._response_ids[self.rows[0]])
        recording = [n for n, request in enumerate(requests) if request.record]
        if recording:
            slots = [self._buffer.open(self.rows[n]) for n in recording]
            recorded_RV = logits_RV if len(recording) == len(requests) else logits_RV[recording]
            statistics = row_statistics(recorded_RV, self._config.k, self._config.vocab_size)
            self._buffer.write(slots, [position] * len(slots), statistics)
        uniforms = [float(self._uniforms[row][position]) for row in self.rows]
        sampled_R = sample(
            logits_RV,
            [request.temperature for request in requests],
            [request.top_p for request in requests],
            uniforms,
        )
        sampled_logits = logits_RV.gather(1, sampled_R[:, None]).squeeze(1).tolist()
        self._input_ids_RT = sampled_R[:, None]
        for row, token, logit in zip(self.rows, sampled_R.tolist(), sampled_logits, strict=True):
            self._response_ids[row].append(token)
            self._sampled_logits[row].append(logit)
        return self._leave()

    def _forward(self) -> torch.Tensor:
        """Next-token logits [R, shared V] in float32."""
        past = self._cache.get_seq_length()
        total = past + self._input_ids_RT.shape[1]
        positions_T = torch.arange(total, device=self._device)
        mask_RT = (positions_T >= self._padding_R[:, None]).long()
        position_ids_RT = (positions_T[past:] - self._padding_R[:, None]).clamp(min=0)
        output = self._model(
            input_ids=self._input_ids_RT,
            attention_mask=mask_RT,
            position_ids=position_ids_RT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1, : self._config.vocab_size].float()

    def _leave(self) -> list[Finished]:
        """Take finished rows out of the batch and its cache."""
        reasons = [self._finish_reason(row) for row in self.rows]
        staying = [n for n, reason in enumerate(reasons) if reason is None]
        finished = [
            self._finished(row, reason)
            for row, reason in zip(self.rows, reasons, strict=True)
            if reason is not None
        ]
        if finished and staying:
            staying_R = torch.tensor(staying, device=self._device)
            self._cache.batch_select_indices(staying_R)
            self._padding_R = self._padding_R[staying_R]
            self._input_ids_RT = self._input_ids_RT[staying_R]
        self.rows = [self.rows[n] for n in staying]
        return finished

    def _finish_reason(self, row: int) -> str | None:
        response_ids = self._response_ids[row]
        if response_ids[-1] in self._config.eos_ids:
            return "stop"
        full = len(response_ids) >= self._requests[row].max_response_tokens
        return "length" if full else None

    def _finished(self, row: int, reason: str) -> Finished:
        request, trace = self._requests[row], None
        response_ids = np.array(self._response_ids[row], np.int32)
        if request.record:
            recorded = self._buffer.take(row, len(response_ids))
            trace = recorded.trace(np.array(self._sampled_logits[row], np.float32))
        return Finished(request.index, response_ids, reason, trace)


def batches(requests: Sequence[Request], max_batch_tokens: int) -> Iterator[list[Request]]:
    """Requests by prompt length, so that rows times the longest row stays within the budget.

    A request above the budget travels alone.
    """
    batch: list[Request] = []
    longest_response = 0
    for request in sorted(requests, key=lambda one: len(one.prompt_ids)):
        longest_response = max(longest_response, request.max_response_tokens)
        row_tokens = len(request.prompt_ids) + longest_response
        if batch and (len(batch) + 1) * row_tokens > max_batch_tokens:
            yield batch
            batch, longest_response = [], request.max_response_tokens
        batch.append(request)
    if batch:
        yield batch


def _uniforms(request: Request) -> torch.Tensor:
    """[max_response_tokens] in [0, 1): one draw a position, on the CPU whatever the device."""
    generator = torch.Generator().manual_seed(request.seed)
    return torch.rand(request.max_response_tokens, generator=generator, dtype=torch.float64)


def _engine_args(config: EngineConfig) -> dict[str, Any]:
    for name in config.engine_args:
        if name not in ENGINE_ARGS:
            expected = f"one of {', '.join(ENGINE_ARGS)} with engine transformers"
            raise SpecError(f"rollout.engine_args.{name}", "an unknown key", expected, "remove it")
    for field, value in (
        ("num_gpus", config.num_gpus),
        ("tensor_parallel", config.tensor_parallel),
    ):
        if value > 1:
            cure = "use engine vllm"
            raise SpecError(
                f"rollout.{field}", str(value), "at most 1 with engine transformers", cure
            )
    return ENGINE_ARGS | config.engine_args
