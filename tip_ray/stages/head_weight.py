"""The LM head of a checkpoint alone: for engines that keep theirs to themselves, and for a learner
that compares hidden states.

V  shared vocabulary        D  width of a hidden state
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tip_ray.contract.errors import SpecError
from tip_ray.stages.models import load_config, trunk_and_head
from tip_ray.stages.reading import one_line


def head_weight(
    path: str,
    dtype: str,
    rows: slice,
    trust_remote_code: bool = False,
    field: str = "model",
    cure: str = "",
) -> Tensor:
    """[rows, D] on the CPU; of a tied head the embedding. Nothing else is read.

    Args:
        field, cure: the spec's name for the checkpoint, and what to do where it has no head.

    Raises:
        SpecError: the checkpoint's safetensors hold no such tensor, or cannot be read; or its
            logits are not hidden @ head.
    """
    config = load_config(path, trust_remote_code, field)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    names = _names(model, field)
    files = sorted(Path(path).glob("*.safetensors"))
    try:
        for name, file in itertools.product(names, files):
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118 - not a mapping
                    return opened.get_slice(name)[rows].to(getattr(torch, dtype))
    except SafetensorError as error:
        found = f"{path}: {one_line(error)}"
        raise SpecError(field, found, "readable safetensors weights") from None
    expected = f"a tensor {' or '.join(names)} in its safetensors files"
    raise SpecError(field, f"none in {path}", expected, cure)


def _names(model: PreTrainedModel, field: str) -> list[str]:
    """What a checkpoint calls the head; a tied one is rather saved as the embedding."""
    _, head_VD = trunk_and_head(model, field)
    tied = model.config.get_text_config().tie_word_embeddings
    wanted = [model.get_input_embeddings().weight, head_VD] if tied else [head_VD]
    named = list(model.named_parameters(remove_duplicate=False))
    return list(dict.fromkeys(name for one in wanted for name, held in named if held is one))
