"""Can this student learn from this teacher? Answered from configs and tokenizers alone.

V  rows of an LM head; the shared vocabulary is the smaller of the two
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from tip_ray.contract.errors import ModelMismatchError, SpecError
from tip_ray.contract.spec import RunSpec
from tip_ray.stages.models import (
    load_config,
    load_tokenizer,
    local_model_path,
    refuse_foreign_head,
    whole_checkpoint,
)
from tip_ray.stages.prompts import encode, first_prompt

# Cut into tokens differently by tokenizers that share a vocabulary but not merges or normalisation.
_PROBES = (
    "127+218=345",
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn x ** 2  # Ünïcode, 数学 and \u200b 🙂\n\n",
    "$\\frac{1}{2} \\leq \\sum_{i=1}^{n} x_i$ CamelCase 1234567890",
)


@dataclass(frozen=True)
class PairFacts:
    """What the stages need to know of the pair."""

    # Local checkpoint directories, on the machine that made the check; of a hub id or a URL with
    # its weights only after `with_weights`.
    student_path: str
    teacher_path: str
    vocab_size: int  # shared: ids at or above it exist in one padded head only
    support_k: int  # support.k, at most the vocabulary
    teacher_hidden: int  # width of the teacher's hidden state
    eos_ids: tuple[int, ...]  # any of them ends a response; ascending
    pad_id: int  # fills tensors where nothing reads
    template_differs: bool  # the first prompt reads differently under the two templates


@dataclass(frozen=True)
class _Side:
    """One model's files, read."""

    role: str  # student | teacher
    model: str
    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]


def check_pair(spec: RunSpec) -> PairFacts:
    """Check that the models of `spec` can be paired; reads and downloads no weights.

    Raises:
        SpecError: a model or the first prompt cannot be read, or lengths do not fit.
        ModelMismatchError: vocabularies, tokenizers, EOS ids or chat templates differ.
    """
    student = _side("student", spec)
    teacher = _side("teacher", spec)
    vocab_size = min(student.config.vocab_size, teacher.config.vocab_size)
    _same_tokens(student, teacher, vocab_size)
    _same_cuts(student, teacher)
    if student.eos_ids != teacher.eos_ids:
        raise ModelMismatchError(
            f"EOS ids differ: student {_named(student)}, teacher {_named(teacher)}; "
            "list the same eos_token_id in both generation_config.json"
        )
    differs = _template_differs(spec, student, teacher)
    _lengths_fit(spec, student, teacher)
    pad_id = student.tokenizer.pad_token_id
    return PairFacts(
        student_path=student.path,
        teacher_path=teacher.path,
        vocab_size=vocab_size,
        support_k=min(spec.support.k, vocab_size),
        teacher_hidden=teacher.config.hidden_size,
        eos_ids=student.eos_ids,
        pad_id=student.eos_ids[0] if pad_id is None else pad_id,
        template_differs=differs,
    )


def with_weights(spec: RunSpec, facts: PairFacts) -> PairFacts:
    """`facts` of checkpoints that lie on this machine whole, downloaded first if need be.

    Raises:
        SpecError: one cannot be reached, or has no safetensors.
    """
    student, teacher = spec.student, spec.teacher
    return replace(
        facts,
        student_path=whole_checkpoint(student.model, student.revision, "student.model"),
        teacher_path=whole_checkpoint(teacher.model, teacher.revision, "teacher.model"),
    )


def _side(role: str, spec: RunSpec) -> _Side:
    part = spec.student if role == "student" else spec.teacher
    field = f"{role}.model"
    path = local_model_path(part.model, part.revision, field, weights=False)
    config = load_config(path, part.trust_remote_code, field)
    refuse_foreign_head(config, field)
    tokenizer = load_tokenizer(path, part.trust_remote_code, field)
    eos_ids = eos_ids_of(path, config, tokenizer)
    if not eos_ids:
        cure = "set eos_token_id in its generation_config.json"
        raise SpecError(field, f"{part.model} without an EOS id", "one that ends responses", cure)
    return _Side(role, part.model, path, config, tokenizer, eos_ids)


def eos_ids_of(
    path: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Every id that ends a response, by generation config, config or tokenizer; ascending."""
    named = [config.eos_token_id, tokenizer.eos_token_id]
    if (Path(path) / "generation_config.json").is_file():
        named.append(GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id)
    ids: set[int] = set()
    for one in named:
        ids.update(one if isinstance(one, (list, tuple)) else [] if one is None else [one])
    return tuple(sorted(ids))


def _same_tokens(student: _Side, teacher: _Side, vocab_size: int) -> None:
    ours, theirs = (_by_id(side.tokenizer) for side in (student, teacher))
    for token_id in sorted(ours.keys() | theirs.keys()):
        if token_id < vocab_size and ours.get(token_id) != theirs.get(token_id):
            raise ModelMismatchError(
                f"tokenizers differ at id {token_id}: student {_token(ours, token_id)}, teacher "
                f"{_token(theirs, token_id)}; choose a teacher of the same model family"
            )
    for side, tokens in ((student, ours), (teacher, theirs)):
        outside = [token_id for token_id in (*tokens, *side.eos_ids) if token_id >= vocab_size]
        if outside:
            sizes = f"student {student.config.vocab_size}, teacher {teacher.config.vocab_size} rows"
            raise ModelMismatchError(
                f"vocabularies differ: {side.role} id {min(outside)} "
                f"({_token(tokens, min(outside))}) is outside the {vocab_size} ids that both heads "
                f"have ({sizes}); choose a teacher of the same model family"
            )


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _token(tokens: dict[int, str], token_id: int) -> str:
    return repr(tokens[token_id]) if token_id in tokens else "nothing"


def _same_cuts(student: _Side, teacher: _Side) -> None:
    # Some of the vocabulary's own text too: a small tokenizer may refuse every other probe.
    ids = sorted(_by_id(student.tokenizer))
    ids = ids[:: -(-len(ids) // 256)]
    own = (student.tokenizer.decode(ids), " ".join(student.tokenizer.convert_ids_to_tokens(ids)))
    for probe in (*_PROBES, *own):
        ours, theirs = (_cut(side.tokenizer, probe) for side in (student, teacher))
        if ours != theirs:
            raise ModelMismatchError(
                f"tokenizers cut {probe[:40]!r} differently: student {_short(ours)}, teacher "
                f"{_short(theirs)}; choose a teacher of the same model family"
            )


def _cut(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    try:
        return encode(tokenizer, text, special_tokens=False)
    except ValueError:
        return None  # refused: equal if the other refuses it too


def _named(side: _Side) -> str:
    tokens = side.tokenizer.convert_ids_to_tokens(list(side.eos_ids))
    return ", ".join(f"{one} ({name!r})" for one, name in zip(side.eos_ids, tokens, strict=True))


def _template_differs(spec: RunSpec, student: _Side, teacher: _Side) -> bool:
    ours = first_prompt(spec.prompts, student.tokenizer).tolist()
    theirs = first_prompt(spec.prompts, teacher.tokenizer).tolist()
    if ours == theirs:
        return False
    if spec.prompts.allow_template_mismatch:
        return True
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    at = min(len(ours), len(theirs)) if at is None else at
    shown = [
        repr(side.tokenizer.decode(ids[at : at + 8]))
        for side, ids in ((student, ours), (teacher, theirs))
    ]
    raise ModelMismatchError(
        f"the first prompt reads differently from its token {at} on: student {shown[0]}, "
        f"teacher {shown[1]}; set prompts.allow_template_mismatch to let the teacher read its own"
    )


def _lengths_fit(spec: RunSpec, student: _Side, teacher: _Side) -> None:
    """Training lengths in both models, evaluation lengths in the student: only it answers."""
    prompt = spec.rollout.max_prompt_tokens
    asked = [
        ("rollout.max_response_tokens", spec.rollout.max_response_tokens, side)
        for side in (student, teacher)
    ]
    asked += [
        (f"evaluation.{entry.name}.max_response_tokens", entry.max_response_tokens, student)
        for entry in spec.evaluation
    ]
    for field, response, side in asked:
        limit = getattr(side.config, "max_position_embeddings", None)
        if limit is not None and prompt + response > limit:
            found = f"{response} after prompts of {prompt} tokens"
            expected = f"together at most {limit}, the positions of the {side.role}"
            raise SpecError(field, found, expected, "lower it or rollout.max_prompt_tokens")


def describe_first_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int] | np.ndarray,
    eos_ids: Iterable[int],
    teacher_prompt_ids: Sequence[int] | np.ndarray | None = None,
) -> list[str]:
    """Lines that show one rendered prompt, its ids and what ends a response."""
    stops = [f"{one} {tokenizer.convert_ids_to_tokens(one)!r}" for one in eos_ids]
    lines = _shown("first prompt", tokenizer, prompt_ids)
    if teacher_prompt_ids is not None:
        lines += _shown("the teacher reads", tokenizer, teacher_prompt_ids)
    return [*lines, f"stop ids: {', '.join(stops)}"]


def _shown(
    title: str, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray
) -> list[str]:
    plain = [int(one) for one in ids]
    text = tokenizer.decode(plain)
    return [f"{title} ({len(plain)} tokens): {text!r}", f"  ids: {_short(plain, 40)}"]


def _short(ids: Sequence[int] | None, most: int = 8) -> str:
    if ids is None:
        return "refuses it"
    more = ", ..." if len(ids) > most else ""
    return f"[{', '.join(map(str, ids[:most]))}{more}]"
