"""Weights by version: the only back edge, from the learners to the rollout replicas.

The learner's rank 0 yields one WeightGroup a layer group; the yielded objects outlive it, so a
WeightVersion is a handful of references that any new replica can load. The driver never
dereferences them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGN_BYTES = 64


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies in its group's buffer."""

    name: str  # as in the Hugging Face file
    dtype: str  # torch's name, e.g. bfloat16
    shape: tuple[int, ...]
    offset: int  # bytes


@dataclass(frozen=True)
class WeightGroup:
    """Some named tensors in one flat buffer: Ray hands the buffer out without a copy."""

    slots: tuple[TensorSlot, ...]
    buffer: npt.NDArray[np.uint8]

    @classmethod
    def pack(cls, tensors: Mapping[str, torch.Tensor]) -> WeightGroup:
        """Copy CPU tensors into one buffer."""
        slots, end = [], 0
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            slots.append(TensorSlot(name, dtype, tuple(tensor.shape), end))
            end += -(-tensor.numel() * tensor.element_size() // _ALIGN_BYTES) * _ALIGN_BYTES
        buffer = np.zeros(end, np.uint8)
        for slot, tensor in zip(slots, tensors.values(), strict=True):
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
            buffer[slot.offset : slot.offset + raw.size] = raw
        return cls(tuple(slots), buffer)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Named tensors, each a private copy: Ray's buffers are read-only, torch writes."""
        for slot in self.slots:
            dtype = getattr(torch, slot.dtype)
            size = int(np.prod(slot.shape, dtype=np.int64)) * dtype.itemsize
            raw = np.array(self.buffer[slot.offset : slot.offset + size])
            yield slot.name, torch.from_numpy(raw).view(dtype).view(slot.shape)

    @property
    def nbytes(self) -> int:
        return int(self.buffer.nbytes)


@dataclass(frozen=True)
class WeightVersion:
    """References to all groups of one version."""

    version: int  # the number of updates behind it; 0 is the initial student
    group_refs: tuple[Any, ...]  # ray.ObjectRef of WeightGroup
    nbytes: int


def named_tensors(groups: Sequence[WeightGroup]) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a version, group by group."""
    for group in groups:
        yield from group.tensors()
