"""The plan's bytes against tensors that real models make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tip_ray.compute.loss import hidden_loss, kept_loss
from tip_ray.control.plan_memory import (
    H100,
    activation_bytes,
    decoding_seconds,
    kv_bytes_a_token,
    loss_bytes,
    scoring_bytes,
    training_bytes,
    training_seconds,
    weight_bytes,
)
from tip_ray.control.plan_models import PUBLIC, Architecture, read_architecture

KINDS: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
TOKENS = 192


def made(kind: str, *, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = KINDS[kind](
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=320,
        vocab_size=500,
        tie_word_embeddings=tied,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def facts(model: PreTrainedModel) -> Architecture:
    found = read_architecture(model.config.to_dict())
    assert found is not None
    return found


def bytes_of(tensors: Any) -> int:
    """Of distinct storages."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def saved_by_autograd(model: PreTrainedModel) -> int:
    """Bytes that a forward of TOKENS tokens leaves for the backward, weights apart."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    ids = torch.randint(0, 500, (1, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept = bytes_of(one for one in saved if one.untyped_storage().data_ptr() not in own)
    hidden.sum().backward()
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_saves(kind: str) -> None:
    model = made(kind).train()
    real = saved_by_autograd(model)
    assert activation_bytes(facts(model), TOKENS, 2, checkpointing=False) == pytest.approx(
        real, rel=0.15
    )


@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_adam_are_those_of_a_real_update(tied: bool) -> None:
    model = made("qwen3", tied=tied, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    hidden = model.base_model(input_ids=torch.arange(20)[None], use_cache=False)
    model.get_output_embeddings()(hidden.last_hidden_state).square().sum().backward()
    optimizer.step()
    found = training_bytes(
        facts(model), ranks=1, dtype_bytes=2, tokens=20, kept=20, checkpointing=False
    )
    parameters = list(model.parameters())
    moments = [one for state in optimizer.state.values() for one in state.values() if one.ndim]
    gradients = [own.grad for own in parameters if own.grad is not None]
    assert found.masters == bytes_of(parameters)
    assert found.gradients == bytes_of(gradients)
    assert found.adam == bytes_of(moments)
    assert weight_bytes(facts(model), 4) == bytes_of(parameters)


def test_ranks_share_what_is_sharded_and_nothing_else() -> None:
    model, common = PUBLIC["Qwen/Qwen3-4B"], {"dtype_bytes": 2, "tokens": 10240, "kept": 5120}
    one, four = (
        training_bytes(model, ranks=ranks, checkpointing=True, **common) for ranks in (1, 4)
    )
    for part in ("masters", "gradients", "adam"):
        assert getattr(four, part) == getattr(one, part) / 4
    assert (four.activations, four.loss) == (one.activations, one.loss)
    assert four.copies == one.copies + 2 * model.layer_parameters  # the next layer arrives


@pytest.mark.parametrize("kind", KINDS)
def test_a_kv_cache_is_as_large_as_a_real_one(kind: str) -> None:
    model, cache = made(kind).eval(), DynamicCache()
    with torch.inference_mode():
        model.base_model(input_ids=torch.arange(30).reshape(2, 15), past_key_values=cache)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 30 * kv_bytes_a_token(facts(model), 2) == real


@pytest.mark.parametrize("full", [False, True])
def test_the_loss_saves_its_gradients_and_no_logits(full: bool) -> None:
    model = facts(made("llama"))
    hidden_ND = torch.randn(40, model.hidden, dtype=torch.bfloat16, requires_grad=True)
    head_VD = torch.randn(model.vocab, model.hidden, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor), lambda packed: packed
    ):
        if full:
            hidden_loss(hidden_ND, head_VD, hidden_ND.detach(), head_VD.detach(), torch.ones(40))
        else:
            ids_NK = torch.arange(8).repeat(40, 1)
            kept_loss(hidden_ND, head_VD, ids_NK, torch.full((40, 8), -4.0), torch.ones(40))
    buffers = 5 if full else 3
    chunk = buffers * 4 * 40 * model.vocab
    assert loss_bytes(model, 40, 2, full=full) - chunk == bytes_of([*saved, hidden_ND])


def test_a_teacher_is_spread_over_its_devices() -> None:
    model = PUBLIC["meta-llama/Llama-3.1-70B-Instruct"]
    common = {"dtype_bytes": 2, "tokens": 10240, "chunk_rows": 512}
    whole, third = (scoring_bytes(model, devices=devices, **common) for devices in (1, 3))
    assert whole[0] == pytest.approx(3 * third[0])
    assert whole[0] == 2 * 70_553_706_496
    assert whole[1:] == third[1:]


def test_seconds_follow_the_work_and_the_devices() -> None:
    model = PUBLIC["Qwen/Qwen3-4B"]
    one = training_seconds(model, 1_000_000, 1, H100, checkpointing=False)
    assert one == pytest.approx(6 * 4_022_468_096 * 1e6 / (989e12 * 0.4))
    assert training_seconds(model, 2_000_000, 4, H100, checkpointing=False) == one / 2
    again = training_seconds(model, 1_000_000, 1, H100, checkpointing=True)
    assert again == pytest.approx(one * 8 / 6)
    decode: Any = {"prompt_tokens": 0, "response_tokens": 1000, "dtype_bytes": 2, "device": H100}
    few = decoding_seconds(model, rows=8, at_once=8, devices=1, **decode)
    read = 2 * 4_022_468_096 + 8 * 500 * 2 * 36 * 1024 * 2
    assert few == pytest.approx(1000 * read / (3.35e12 * 0.5))
    assert decoding_seconds(model, rows=16, at_once=8, devices=1, **decode) == 2 * few
    assert decoding_seconds(model, rows=8, at_once=8, devices=2, **decode) == few / 2
