"""Toy pairs with padded heads of different sizes, and what their runs have to say: float64.

m  response tokens    V  shared vocabulary    J  support and tail    D  width of a hidden state
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.stages.toys import WORDS, toy_config, toy_tokenizer
from tip_ray.stages.state import read_parameters

TOKENS, SHARED, WIDE = 90, 96, 128  # of the tokenizer; rows of the narrower and the wider head
K = 8


def save_padded(path: Path, kind: str, *, rows: int, tied: bool, seed: int) -> str:
    """A whole checkpoint whose rows beyond the shared vocabulary would win every softmax."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 96}
    if kind == "qwen3":
        shape["head_dim"] = 32  # vLLM's attention on the CPU needs heads of a multiple of 32
    config = toy_config(kind, vocab_size=rows, tie_word_embeddings=tied, **shape)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight[SHARED:] *= 30
    model.save_pretrained(path)
    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), TOKENS))]
    toy_tokenizer(words).save_pretrained(path)
    return str(path)


def save_prompts(path: Path) -> str:
    """Rows of two lengths."""
    texts = [f"what is {i % 10} + w{30 + i} ?" for i in range(12)]
    texts += [f"w{50 + i} - {i}" for i in range(4)]
    path.write_text("".join(json.dumps({"problem": text}) + "\n" for text in texts))
    return str(path)


@dataclass
class Dense:
    """Of one rollout's tokens, in nats and float64."""

    student_mV: Tensor  # log-probabilities
    teacher_mV: Tensor
    teacher_rounded_mV: Tensor  # from hidden states in bfloat16, as they travel
    padding_wins: bool  # at every token of a model that has padding

    def on_support(self) -> Tensor:
        """[m] KL(S||T) on the student's top K and a bucket of all else."""
        ids_mK = self.student_mV.topk(K).indices
        student_mJ, teacher_mJ = (
            torch.cat([own.gather(1, ids_mK), _outside(own, ids_mK)], dim=1)
            for own in (self.student_mV, self.teacher_mV)
        )
        return kl(student_mJ, teacher_mJ)


def kl(p_mV: Tensor, q_mV: Tensor) -> Tensor:
    return (p_mV.exp() * (p_mV - q_mV)).sum(1)


def _outside(logprobs_mV: Tensor, ids_mK: Tensor) -> Tensor:
    """[m, 1] log-mass of all other ids."""
    named_mV = torch.zeros_like(logprobs_mV, dtype=torch.bool).scatter(1, ids_mK, True)
    return logprobs_mV.exp().masked_fill(named_mV, 0).sum(1, keepdim=True).log()


class Reference:
    """Both models by transformers in float64; the student at any checkpoint of a run."""

    def __init__(self, student: str, teacher: str) -> None:
        torch.set_num_threads(1)
        self.student, self.teacher = _model(student), _model(teacher)

    def take_up(self, checkpoint: str) -> None:
        """The student as a checkpoint of a run has it."""
        wrong = self.student.load_state_dict(dict(read_parameters(checkpoint)), strict=False)
        tied = self.student.config.tie_word_embeddings
        assert wrong.missing_keys == (["lm_head.weight"] if tied else [])
        assert wrong.unexpected_keys == []

    @torch.no_grad()
    def dense(self, row: dict[str, Any]) -> Dense:
        """One dense forward of each model over prompt and response."""
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        inputs = slice(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
        (student_mV, _, wins), (teacher_mV, rounded_mV, theirs) = (
            _forward(model, ids, inputs) for model in (self.student, self.teacher)
        )
        return Dense(student_mV, teacher_mV, rounded_mV, wins and theirs)


def _model(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def _forward(model: PreTrainedModel, ids: Tensor, inputs: slice) -> tuple[Tensor, Tensor, bool]:
    """Log-probabilities over the shared vocabulary, by the model's own forward and by its hidden
    states in bfloat16; and whether an id beyond it would be the most probable everywhere."""
    logits = model(ids, use_cache=False).logits[0, inputs]
    hidden_mD = model.base_model(ids, use_cache=False).last_hidden_state[0, inputs]
    head_VD = model.get_output_embeddings().weight[:SHARED]
    rounded_mV = hidden_mD.bfloat16().double() @ head_VD.T
    wins = logits.shape[1] == SHARED or bool((logits.argmax(1) >= SHARED).all())
    return logits[:, :SHARED].log_softmax(1), rounded_mV.log_softmax(1), wins
