"""Where the numbers of unfinished responses wait: on the engine's device, until one is finished.

N  rows of one decode step    K  width of the support    S  responses at once    P  positions
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tip_ray.compute.divergence import RowStatistics
from tip_ray.stages.engines.base import Trace

# Columns of the float buffer before the K top log-probabilities.
_ENTROPY, _TAIL, _NORMALIZER, _TOPK = 0, 1, 2, 3


@dataclass(frozen=True)
class Recorded:
    """RowStatistics of one response, on the host; the sampled token is not known here."""

    entropy: npt.NDArray[np.float32]  # [m] nats
    topk_ids: npt.NDArray[np.int32]  # [m, K]
    topk_logprobs: npt.NDArray[np.float32]  # [m, K] nats
    tail_logprob: npt.NDArray[np.float32]  # [m] nats
    log_normalizer: npt.NDArray[np.float32]  # [m]

    def trace(self, sampled_logit: npt.NDArray[np.float32]) -> Trace:
        """With the sampled tokens' raw logits [m], which give their exact log-probability."""
        logprob = sampled_logit.astype(np.float64) - self.log_normalizer
        return Trace(
            logprob=np.minimum(logprob, 0.0).astype(np.float32),
            entropy=self.entropy,
            topk_ids=self.topk_ids,
            topk_logprobs=self.topk_logprobs,
            tail_logprob=self.tail_logprob,
        )


class TraceBuffer:
    """A slot per open response; both dimensions double when they run out.

    Positions are written by index and the last write wins: an engine may sample a position, throw
    the token away and sample it again.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self._ids_SPK = torch.zeros((0, 0, k), dtype=torch.int32, device=device)
        self._values_SPJ = torch.zeros((0, 0, _TOPK + k), dtype=torch.float32, device=device)
        self._slots: dict[Hashable, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._slots)

    def open(self, key: Hashable) -> int:
        """The slot of `key`, a new one the first time."""
        if key not in self._slots:
            if not self._free:
                self._grow(slots=len(self._slots) + 1, positions=1)
            self._slots[key] = self._free.pop()
        return self._slots[key]

    def write(
        self, slots: Sequence[int], positions: Sequence[int], statistics: RowStatistics
    ) -> None:
        """Row n of `statistics` becomes position `positions[n]` of slot `slots[n]`."""
        self._grow(slots=0, positions=max(positions) + 1)
        slots_N = torch.tensor(slots, device=self._ids_SPK.device)
        positions_N = torch.tensor(positions, device=self._ids_SPK.device)
        self._ids_SPK[slots_N, positions_N] = statistics.topk_ids_NK.to(torch.int32)
        scalars_N3 = torch.stack(
            (statistics.entropy_N, statistics.tail_logprob_N, statistics.log_normalizer_N), dim=1
        )
        values_NJ = torch.cat((scalars_N3, statistics.topk_logprobs_NK), dim=1)
        self._values_SPJ[slots_N, positions_N] = values_NJ.to(torch.float32)

    def take(self, key: Hashable, length: int) -> Recorded:
        """The first `length` positions of `key`, whose slot becomes free."""
        slot = self._slots.pop(key)
        self._free.append(slot)
        ids_PK = self._ids_SPK[slot, :length].cpu().numpy().copy()
        values_PJ = self._values_SPJ[slot, :length].cpu().numpy().copy()
        return Recorded(
            entropy=values_PJ[:, _ENTROPY],
            topk_ids=ids_PK,
            topk_logprobs=values_PJ[:, _TOPK:],
            tail_logprob=values_PJ[:, _TAIL],
            log_normalizer=values_PJ[:, _NORMALIZER],
        )

    def discard(self, keys: Sequence[Hashable]) -> None:
        """Forget the responses of `keys`, open or not."""
        for key in keys:
            slot = self._slots.pop(key, None)
            if slot is not None:
                self._free.append(slot)

    def _grow(self, slots: int, positions: int) -> None:
        old_slots, old_positions, _ = self._ids_SPK.shape
        if slots <= old_slots and positions <= old_positions:
            return
        new_slots = max(old_slots, _doubled(old_slots, slots))
        new_positions = max(old_positions, _doubled(old_positions, positions))
        self._ids_SPK = _resized(self._ids_SPK, new_slots, new_positions)
        self._values_SPJ = _resized(self._values_SPJ, new_slots, new_positions)
        self._free.extend(range(old_slots, new_slots))


def _doubled(old: int, needed: int) -> int:
    return old if needed <= old else max(needed, 2 * old, 16)


def _resized(old_SPX: torch.Tensor, slots: int, positions: int) -> torch.Tensor:
    new_SPX = old_SPX.new_zeros((slots, positions, old_SPX.shape[2]))
    new_SPX[: old_SPX.shape[0], : old_SPX.shape[1]] = old_SPX
    return new_SPX
