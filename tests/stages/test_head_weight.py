"""The LM head alone, out of a checkpoint's safetensors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.stages.toys import save_model
from tip_ray.contract.errors import SpecError
from tip_ray.stages import head_weight as module
from tip_ray.stages.head_weight import head_weight

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"kind": "qwen3", "tie_word_embeddings": True},
    "untied": {"kind": "llama"},
    "qwen2": {"kind": "qwen2"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loaded_models_head(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(tmp_path / shape, **SHAPES[shape])
    expected_VD = AutoModelForCausalLM.from_pretrained(path).get_output_embeddings().weight[:29]
    read: list[str] = []

    class Spy:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._file = safe_open(*args, **options)

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *_: object) -> None:
            """As safe_open, which has nothing to close."""

        def keys(self) -> list[str]:
            return self._file.keys()

        def get_slice(self, name: str) -> Any:
            read.append(name)
            return self._file.get_slice(name)

    monkeypatch.setattr(module, "safe_open", Spy)
    found_VD = head_weight(path, "bfloat16", slice(29))
    assert found_VD.dtype == torch.bfloat16
    assert torch.equal(found_VD, expected_VD.bfloat16())
    assert len(read) == 1


def test_rows_of_it_make_the_whole(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", kind="llama")
    bounds = (0, 13, 26, 29, 29)
    parts = [
        head_weight(path, "float32", slice(begin, end)) for begin, end in itertools.pairwise(bounds)
    ]
    assert parts[-1].shape == (0, 32)
    assert torch.equal(torch.cat(parts), head_weight(path, "float32", slice(29)))


def test_of_several_files(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", kind="llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    (Path(path) / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="5KB")
    assert len(list(Path(path).glob("*.safetensors"))) > 2
    assert torch.equal(head_weight(path, "float32", slice(32)), model.lm_head.weight)


def test_a_tied_head_is_the_embedding_even_if_another_is_saved(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", tie_word_embeddings=True)
    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    embedding_VD = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding_VD + 1}, file, metadata={"format": "pt"})
    assert torch.equal(head_weight(path, "float32", slice(32)), embedding_VD)


def test_a_checkpoint_without_it_is_one_line(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", kind="llama")
    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"teacher\.model: .*lm_head\.weight.*use another"):
        head_weight(path, "float32", slice(32), field="teacher.model", cure="use another")
    file.write_bytes(b"no safetensors")
    with pytest.raises(SpecError, match=r"teacher\.model: .*readable safetensors"):
        head_weight(path, "float32", slice(32), field="teacher.model")


def test_logits_that_are_not_hidden_times_head_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", kind="llama", final_logit_softcapping=30.0)
    with pytest.raises(SpecError, match="final_logit_softcapping"):
        head_weight(path, "float32", slice(32))
