"""What a plan knows of a model: its architecture by config.json, and how many parameters that is.

A hub id is not read: planning starts nothing and needs no network. The public models that the
shipped specs name are in `PUBLIC`, from the config.json that each hub repository publishes.

D  hidden width    V  rows of the head    Q, C  width of all query heads, of all key or value heads
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tip_ray import demo

_NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


@dataclass(frozen=True)
class Architecture:
    """A dense decoder of the Llama family: RMSNorm, grouped queries, gated MLP."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int  # rows of the head, padding included
    tied: bool  # the head is the embedding
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer: projections, MLP, their biases, norms."""
        d, q, c, i = self.hidden, self.query_width, self.kv_width, self.intermediate
        projections = 2 * d * q + 2 * d * c + 3 * d * i
        biases = self.qkv_bias * (q + 2 * c) + self.output_bias * d + self.mlp_bias * (2 * i + d)
        return projections + biases + 2 * d + self.qk_norm * 2 * self.head_dim

    @property
    def root_parameters(self) -> int:
        """Outside the layers: embedding, final norm, and the head where it is not the embedding."""
        return (1 if self.tied else 2) * self.head_parameters + self.hidden

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.root_parameters


def _qwen3(hidden: int, intermediate: int, *, tied: bool) -> Architecture:
    return Architecture(hidden, 36, 32, 8, 128, intermediate, 151_936, tied, qk_norm=True)


def _llama(hidden: int, layers: int, heads: int, intermediate: int) -> Architecture:
    return Architecture(hidden, layers, heads, 8, 128, intermediate, 128_256, tied=False)


PUBLIC = {
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, tied=False),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(4096, 32, 32, 14336),
    "meta-llama/Llama-3.1-70B-Instruct": _llama(8192, 80, 64, 28672),
    "Qwen/Qwen2.5-1.5B-Instruct": Architecture(
        1536, 28, 12, 2, 128, 8960, 151_936, tied=True, qkv_bias=True
    ),
    "Qwen/Qwen2.5-14B-Instruct": Architecture(
        5120, 48, 40, 8, 128, 13824, 152_064, tied=False, qkv_bias=True
    ),
}


def architecture_of(model: str) -> Architecture | None:
    """By a local directory's config.json, else by `PUBLIC`; None where neither says.

    None too where the file is broken: the check of the pair says so, and how.
    """
    file = local_directory(model) / "config.json"
    if not file.is_file():
        return PUBLIC.get(model)
    try:
        return read_architecture(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        return None


def local_directory(model: str) -> Path:
    """Where the checkpoint would lie, if it is local."""
    known = model.removeprefix(demo.PREFIX) in demo.CHECKPOINTS and model.startswith(demo.PREFIX)
    return demo.checkpoint_path(model) if known else Path(model)


def read_architecture(config: dict[str, Any]) -> Architecture | None:
    """From a config.json's content; None for another family, or where it does not say enough."""
    kind = config.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3") or any(name not in config for name in _NEEDED):
        return None
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    bias = kind == "qwen2" or bool(config.get("attention_bias"))
    return Architecture(
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or (heads if kind == "llama" else 32),
        head_dim=head_dim,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
        qkv_bias=bias,
        output_bias=bias and kind != "qwen2",
        mlp_bias=kind == "llama" and bool(config.get("mlp_bias")),
        qk_norm=kind == "qwen3",
    )
