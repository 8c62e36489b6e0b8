"""Toy checkpoints with real architectures and real tokenizers, made in a temporary directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORDS = ("<eos>", "<s>", "<end>", *"0123456789", "+", "-", "=", "what", "is", "?", "user", "system")
EOS_ID = 0
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
CONFIGS = {"qwen3": Qwen3Config, "llama": LlamaConfig, "qwen2": Qwen2Config}


def toy_tokenizer(
    words: Sequence[str] = WORDS, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """One token a word, words cut at spaces; refuses other words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[EOS_ID])
    made.chat_template = chat_template
    return made


def toy_config(kind: str = "qwen3", **changes: Any) -> Any:
    settings = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "eos_token_id": EOS_ID,
        "bos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.3,
    }
    if kind == "qwen3":
        settings["head_dim"] = 8
    return CONFIGS[kind](**{**settings, **changes})


def save_config(path: Path, tokenizer: Any = None, eos: Any = EOS_ID, **changes: Any) -> str:
    """A checkpoint without weights: what the pair checks read."""
    toy_config(**changes).save_pretrained(path)
    GenerationConfig(eos_token_id=eos).save_pretrained(path)
    (tokenizer or toy_tokenizer()).save_pretrained(path)
    return str(path)


def save_model(path: Path, seed: int = 0, **changes: Any) -> str:
    """A whole checkpoint with random weights, in float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(toy_config(**changes)).save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return str(path)
