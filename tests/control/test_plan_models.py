"""Parameters by formula against the real transformers classes, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tip_ray.control.plan_models import PUBLIC, Architecture, architecture_of, read_architecture
from tip_ray.demo import checkpoint_path

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
TOY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 101,
}
KIND_OF = {"Qwen/Qwen3": "qwen3", "meta-llama/": "llama", "Qwen/Qwen2.5": "qwen2"}


def real_parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())  # a tied head comes once


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ],
)
def test_parameters_are_those_of_the_real_class(
    kind: str, more: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    config = CONFIGS[kind](**TOY, **more, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    found = architecture_of(str(tmp_path))
    assert found is not None
    assert found.parameters == real_parameters(config)
    assert found.tied == tied


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_config_leaves_out_is_what_its_class_takes(kind: str) -> None:
    left_out = {"num_key_value_heads"}
    said = {name: value for name, value in TOY.items() if name not in left_out}
    said |= {"num_attention_heads": 32, "hidden_size": 64}
    found = read_architecture({"model_type": kind, **said})
    assert found is not None
    assert found.parameters == real_parameters(CONFIGS[kind](**said))


@pytest.mark.parametrize("model", PUBLIC)
def test_public_models_have_the_parameters_of_their_class(model: str) -> None:
    own = PUBLIC[model]
    kind = next(kind for prefix, kind in KIND_OF.items() if model.startswith(prefix))
    config = CONFIGS[kind](
        hidden_size=own.hidden,
        num_hidden_layers=2,  # a layer is as any other
        num_attention_heads=own.heads,
        num_key_value_heads=own.kv_heads,
        head_dim=own.head_dim,
        intermediate_size=own.intermediate,
        vocab_size=own.vocab,
        tie_word_embeddings=own.tied,
    )
    real = real_parameters(config)
    assert own.parameters == real + (own.layers - 2) * own.layer_parameters


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
    ],
)
def test_public_models_have_their_published_size(model: str, published: int) -> None:
    found = architecture_of(model)
    assert found is not None
    assert found.parameters == published


def test_what_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    assert architecture_of("org/name") is None
    assert read_architecture({"model_type": "gpt2", **TOY}) is None
    assert read_architecture({"model_type": "llama"}) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TOY}))
    assert isinstance(architecture_of(str(tmp_path)), Architecture)
    assert architecture_of("demo:carry-student") == architecture_of(
        str(checkpoint_path("carry-student"))
    )
