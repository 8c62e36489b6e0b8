"""What runs inside a vLLM worker: the recorder of every decode step, and the way to reach it.

N  rows of one decode step    V  width of the logits    K  width of the support
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor.interface import (
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
)

from tip_ray.compute.divergence import row_statistics
from tip_ray.stages.engines.trace_buffer import Recorded, TraceBuffer
from tip_ray.stages.engines.workarounds import repack_heads

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SETTINGS = "tip_ray"  # key of the engine's additional_config: {"k": ..., "vocab_size": ...}
RECORDING = "tip_ray_recording"  # key of a request's extra_args: the number of its recording

_Row = tuple[int, list[int]]  # buffer slot, the request's live list of output ids


class Recorder(LogitsProcessor):
    """Masks ids outside the shared vocabulary and records the rows of requests that ask for it.

    It sees the raw logits of every row before temperature and top-p, greedy or not.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        is_pin_memory: bool,  # noqa: ARG002 - the interface's
    ) -> None:
        settings = vllm_config.additional_config[SETTINGS]
        self._k: int = settings["k"]
        self._vocab_size: int = settings["vocab_size"]
        self.buffer = TraceBuffer(self._k, device)
        self._rows: dict[int, _Row] = {}  # by index in the engine's batch

    def is_argmax_invariant(self) -> bool:
        """False: an invariant processor runs after temperature and is skipped for greedy rows."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removed, then added, then moved. A preempted request keeps its slot."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, output_ids in batch_update.added:
            self._rows.pop(index, None)
            recording = (params.extra_args or {}).get(RECORDING)
            if recording is not None:
                self._rows[index] = (self.buffer.open(recording), output_ids)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Record, and mask in place."""
        logits[:, self._vocab_size :] = float("-inf")
        if self._rows:
            indices = sorted(self._rows)
            rows = [self._rows[index] for index in indices]
            recorded_NV = logits if len(indices) == len(logits) else logits[indices]
            statistics = row_statistics(recorded_NV, self._k, self._vocab_size)
            # By position, never appended: rows of unfinished prompts are sampled and thrown away.
            self.buffer.write([slot for slot, _ in rows], [len(ids) for _, ids in rows], statistics)
        return logits


class WorkerAccess:
    """Mixed into the vLLM worker (`worker_extension_cls`): methods for `collective_rpc`."""

    def tip_ray_reload(self, source: Iterable[tuple[str, torch.Tensor]] | str) -> None:
        """Replace all weights by named tensors, or by the safetensors of a directory."""
        kind = "weights_path" if isinstance(source, str) else "weights_iterator"
        self.reload_weights(**{kind: source})  # type: ignore[attr-defined]
        repack_heads(self.model_runner.get_model())  # type: ignore[attr-defined]

    def tip_ray_take(self, recordings: Sequence[tuple[int, int]]) -> list[Recorded] | None:
        """The traces of finished (recording, length), from the first rank only."""
        buffer = _recorder(self).buffer
        taken = [buffer.take(recording, length) for recording, length in recordings]
        return taken if self.rank == 0 else None  # type: ignore[attr-defined]

    def tip_ray_discard(self, recordings: Sequence[int]) -> int:
        """Forget unfinished recordings; how many are still open."""
        buffer = _recorder(self).buffer
        buffer.discard(recordings)
        return len(buffer)


def _recorder(worker: Any) -> Recorder:
    processors = worker.model_runner.input_batch.logitsprocs.non_argmax_invariant
    return next(one for one in processors if isinstance(one, Recorder))
