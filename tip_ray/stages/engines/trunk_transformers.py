"""transformers as the teacher's trunk: rows padded on the right, batched by length.

B  rows of a batch    T  padded inputs of a row    N  response tokens    D  width of a hidden state
V  shared vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tip_ray.compute.packing import length_buckets, pad_right
from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import TeacherSpec
from tip_ray.stages.engines.trunk import HiddenStates, Row
from tip_ray.stages.models import load_causal_lm, trunk_and_head


class TransformersTrunk:
    """Implements `Trunk`.

    Raises:
        SpecError: the model cannot be loaded, or does not fit the replica's devices.
    """

    max_row_tokens = None

    def __init__(self, teacher: TeacherSpec, path: str, vocab_size: int) -> None:
        model = load_causal_lm(
            path,
            teacher.dtype,
            teacher.trust_remote_code,
            "balanced" if teacher.num_gpus > 1 else None,
            "teacher.model",
        )
        if teacher.num_gpus == 1:
            model = model.to("cuda")
        if teacher.num_gpus and any(one.device.type != "cuda" for one in model.parameters()):
            found = f"{teacher.num_gpus}: {teacher.model} does not fit"
            raise SpecError("teacher.num_gpus", found, "devices that hold the whole model")
        self._trunk, head_VD = trunk_and_head(model, "teacher.model")
        # Rows that only the teacher's padded head has are cut off: no softmax ever sees them.
        self.head_VD = head_VD.detach()[:vocab_size]
        self._input_device = model.get_input_embeddings().weight.device
        self._max_batch_tokens = teacher.max_batch_tokens

    def hidden_states(self, rows: Sequence[Row]) -> HiddenStates:
        """One batch of at most `teacher.max_batch_tokens` padded tokens after the other."""
        for bucket in length_buckets([len(row.input_ids) for row in rows], self._max_batch_tokens):
            indices = bucket.tolist()
            yield indices, self._read([rows[index] for index in indices])

    def close(self) -> None:
        """Free the model."""
        del self._trunk, self.head_VD

    def _read(self, rows: Sequence[Row]) -> Tensor:
        # Padding stands on the right of a causal model: no mask is needed.
        ids_BT = pad_right([row.input_ids for row in rows])
        ends = [place * ids_BT.shape[1] + len(row.input_ids) for place, row in enumerate(rows)]
        places = [
            np.arange(end - row.response_tokens, end) for end, row in zip(ends, rows, strict=True)
        ]
        ids_BT = ids_BT.to(self._input_device)
        hidden_BTD = self._trunk(input_ids=ids_BT, use_cache=False).last_hidden_state
        places_N = torch.from_numpy(np.concatenate(places)).to(hidden_BTD.device)
        return hidden_BTD.flatten(0, 1)[places_N].to(self.head_VD.device)
