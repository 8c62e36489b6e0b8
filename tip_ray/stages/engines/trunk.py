"""What runs the teacher's trunk: token ids in, hidden states of the response tokens out.

The LM head is not part of it: the teacher's own, chunked and exact, serves every trunk.

N  response tokens of some rows        D  width of a hidden state        V  shared vocabulary
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tip_ray.contract.spec import TeacherSpec


class Row(NamedTuple):
    """One rollout, as the trunk reads it: without its last token, which predicts nothing."""

    input_ids: npt.NDArray[np.int64]
    response_tokens: int  # at least 1; predicted by the last that many inputs


HiddenStates = Generator[tuple[Sequence[int], Tensor], None, None]


class Trunk(Protocol):
    """A teacher's decoder up to its final norm; keeps nothing between calls."""

    @property
    def head_VD(self) -> Tensor:  # noqa: N802
        """The LM head's weight, in the trunk's dtype, on the device where the head is computed."""
        ...

    @property
    def max_row_tokens(self) -> int | None:
        """The longest row that it can read; None: any."""
        ...

    def hidden_states(self, rows: Sequence[Row]) -> HiddenStates:
        """Batch by batch, every row once: indices of rows, and the hidden states [N, D] that
        predict their response tokens, row after row, in the head's dtype and on its device.

        Only these are kept of a batch. Closing the generator early drops what is left.
        """
        ...

    def close(self) -> None:
        """Free the device and end worker processes; the trunk is unusable afterwards."""
        ...


def make_trunk(teacher: TeacherSpec, path: str, vocab_size: int, max_row_tokens: int) -> Trunk:
    """The trunk of a spec's `teacher.engine`; its library is imported here and not before.

    Args:
        path: the checkpoint's directory on this machine.
        vocab_size: rows of the head from there on are cut off.
        max_row_tokens: of the longest row, prompt and response.

    Raises:
        SpecError: the model cannot be loaded, does not fit the replica's devices, or
            teacher.engine_args do not fit the engine.
    """
    if teacher.engine == "vllm":
        from tip_ray.stages.engines.trunk_vllm import VllmTrunk

        return VllmTrunk(teacher, path, vocab_size, max_row_tokens)
    from tip_ray.stages.engines.trunk_transformers import TransformersTrunk

    return TransformersTrunk(teacher, path, vocab_size)
