"""An LM head's products, whatever its type, for chunks of rows.

C  rows of a chunk        B  head rows of a block        D  hidden size        V  shared vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CAST_ELEMENTS = 1 << 24  # of the head alive in the compute dtype at once, where it is narrower


class Head(NamedTuple):
    """The head's products; a narrower one is cast block by block, never as a whole.

    All write into given tensors, which also keeps an autocast around the loss from narrowing them.
    """

    weight_VD: Tensor
    grad_VD: Tensor | None  # what `add_grad` adds to; None: nobody asks for it
    vocab_size: int  # rows from there on are outside of the vocabulary
    dtype: torch.dtype

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        step = self.vocab_size
        if self.weight_VD.dtype != self.dtype:
            step = max(_CAST_ELEMENTS // self.weight_VD.shape[1], 1)
        for start in range(0, self.vocab_size, step):
            rows = slice(start, min(start + step, self.vocab_size))
            yield rows, self.weight_VD[rows].to(self.dtype)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        logits_CV = hidden_CD.new_empty(len(hidden_CD), self.vocab_size)
        for rows, block_BD in self._blocks():
            torch.mm(hidden_CD, block_BD.T, out=logits_CV[:, rows])
        return logits_CV

    def grad_hidden(self, grad_CV: Tensor) -> Tensor:
        grad_CD = grad_CV.new_zeros(len(grad_CV), self.weight_VD.shape[1])
        for rows, block_BD in self._blocks():
            grad_CD.addmm_(grad_CV[:, rows], block_BD)
        return grad_CD

    def add_grad(self, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        if self.grad_VD is not None:
            self.grad_VD[: self.vocab_size].addmm_(grad_CV.T, hidden_CD)
