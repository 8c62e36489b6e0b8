"""Prompts: rows of a file, rendered into token ids once, drawn step by step by a plain-data cursor.

Rendering follows the Hugging Face conventions. With `prompts.chat` the row's field (a string, or a
list of {role, content} messages) goes through the tokenizer's chat template with the generation
prompt appended. Without it the string is tokenized as it stands, with the special tokens that the
tokenizer itself puts around a text (Llama's BOS; Qwen adds none).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tip_ray.contract.errors import SpecError
from tip_ray.contract.seeds import derive_seed
from tip_ray.contract.spec import ChatSpec, EvaluationSpec, PromptsSpec
from tip_ray.contract.tables import PROMPTS, build
from tip_ray.stages.prompt_rows import Row, read_rows

Cursor = dict[str, int | str]
"""{"epoch", "index", "digest"}: the next prompt is number `index` of the order of `epoch`; `digest`
names the set of prompts it counts in. Plain JSON data."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One row of the source, rendered."""

    uid: str  # of its text and answer
    ids: npt.NDArray[np.int32]
    teacher_ids: npt.NDArray[np.int32] | None  # where the teacher reads something else
    answer: str | None


@dataclass(frozen=True)
class Renderer:
    """How a row becomes a Prompt; `field` is the spec's name of the section, for errors.

    With `teacher_tokenizer` and `prompts.allow_template_mismatch` the teacher reads its own
    rendering wherever that differs.
    """

    prompts: PromptsSpec
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    answers_required: bool = False

    def render(self, place: str, row: Row) -> Prompt:
        """Render one row.

        Raises:
            SpecError: a field is missing or of another type, or the tokenizer refuses the text.
        """
        value = self._value(place, row, self.prompts.field, "prompts.field")
        answer = self._answer(place, row)
        ids = render_ids(self.tokenizer, value, self.prompts.chat, place)
        teacher_ids = None
        if self.teacher_tokenizer is not None and self.prompts.allow_template_mismatch:
            theirs = render_ids(self.teacher_tokenizer, value, self.prompts.chat, place)
            teacher_ids = None if np.array_equal(ids, theirs) else theirs
        return Prompt(_uid(value, answer), ids, teacher_ids, answer)

    def _value(self, place: str, row: Row, name: str, field: str) -> Any:
        if row.get(name) is None:
            found = f"{place} without {name!r}"
            has = ", ".join(map(str, row)) or "no columns"
            raise SpecError(field, found, "that column in every row", f"the row has: {has}")
        return row[name]

    def _answer(self, place: str, row: Row) -> str | None:
        name = self.prompts.answer_field
        if not self.answers_required and row.get(name) is None:
            return None
        value = self._value(place, row, name, "prompts.answer_field")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            found = f"{place}: {name!r} is a {type(value).__name__}"
            raise SpecError("prompts.answer_field", found, "a string or a number")
        return str(value)


def render_ids(
    tokenizer: PreTrainedTokenizerBase, value: Any, chat: ChatSpec | None, place: str
) -> npt.NDArray[np.int32]:
    """`value` (a string or a list of messages) as token ids.

    Raises:
        SpecError: a wrong type, no or a failing chat template, or a text without tokens.
    """
    try:
        if chat is None:
            ids = encode(tokenizer, _text(value, place))
        else:
            ids = _apply_template(tokenizer, _messages(value, chat, place), chat)
    except (ValueError, jinja2.TemplateError) as error:
        found = f"{place}: {' '.join(str(error).split())[:200]}"
        raise SpecError("prompts.chat" if chat else "prompts.source", found, "a prompt") from None
    if not ids:
        raise SpecError("prompts.field", f"{place}: an empty prompt", "at least one token")
    return np.asarray(ids, np.int32)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = True
) -> list[int]:
    """`text` as token ids.

    Raises:
        ValueError: the tokenizer has no token for a part of it.
    """
    try:
        # verbose warns of long texts; their length is checked by the caller
        found = tokenizer(text, add_special_tokens=special_tokens, verbose=False)
        return list(found["input_ids"])
    except Exception as error:  # tokenizers raises Exception itself
        if type(error) is not Exception:
            raise
        raise ValueError(f"the tokenizer refuses {text[:40]!r} ({error})") from None


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], chat: ChatSpec
) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set prompts.chat to null")
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **chat.template_kwargs
    )
    return encode(tokenizer, text, special_tokens=False)  # the template writes its own


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    cure = "set prompts.chat to render messages" if isinstance(value, list) else ""
    raise SpecError("prompts.field", f"{place}: a {type(value).__name__}", "a string", cure)


def _messages(value: Any, chat: ChatSpec, place: str) -> list[dict[str, Any]]:
    """As the template takes them; the spec's system message unless the row brings its own."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        expected = "a string or a list of {role, content} messages"
        raise SpecError("prompts.field", f"{place}: {value!r}"[:100], expected)
    if value[-1]["role"] == "assistant":
        cure = "drop the answer: the student writes it"
        raise SpecError("prompts.field", f"{place}: ends with the assistant", "a question", cure)
    if chat.system is None or value[0]["role"] == "system":
        return value
    return [{"role": "system", "content": chat.system}, *value]


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one


def _uid(value: Any, answer: str | None) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.blake2b(f"{text}\x1f{answer or ''}".encode(), digest_size=8).hexdigest()


class PromptSource:
    """The run's prompts, shuffled anew each epoch, read in order from a cursor.

    The same cursor gives the same prompts in every process. Everything is read and rendered on
    construction, so that bad data stop the run before anything is started.

    Raises:
        SpecError: on construction; the file, a row, a prompt too long (too_long: error), or nothing
            left after skipping.
    """

    def __init__(
        self,
        prompts: PromptsSpec,
        *,
        max_prompt_tokens: int,
        samples_per_prompt: int,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        answers_required: bool = False,
    ) -> None:
        self._spec, self._seed, self._samples = prompts, seed, samples_per_prompt
        renderer = Renderer(prompts, tokenizer, teacher_tokenizer, answers_required)
        rows = read_rows(prompts.source)
        self._prompts, self._skipped = _fitting(rows, renderer, max_prompt_tokens, prompts.limit)
        if not self._prompts:
            found = f"all {self._skipped} prompts of {prompts.source} longer than the limit"
            expected = f"some of at most {max_prompt_tokens} tokens"
            raise SpecError("rollout.max_prompt_tokens", found, expected, "raise it")
        uids = "".join(prompt.uid for prompt in self._prompts)
        self._digest = hashlib.blake2b(uids.encode(), digest_size=8).hexdigest()
        self._epoch = self._index = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Prompts in an epoch."""
        return len(self._prompts)

    @property
    def skipped(self) -> int:
        """Prompts left out because they are too long."""
        return self._skipped

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, the teacher's rendering included."""
        return max(_tokens(prompt) for prompt in self._prompts)

    @property
    def cursor(self) -> Cursor:
        """Where the next `take` begins; give it to `seek` to go on from here."""
        return {"epoch": self._epoch, "index": self._index, "digest": self._digest}

    def seek(self, cursor: Cursor) -> None:
        """Go on from `cursor`.

        Raises:
            SpecError: it counts in other prompts: the source, its limit or its rendering changed.
        """
        if cursor["digest"] != self._digest:
            cure = "restore the file, or start a new run"
            expected = "the prompts that the run began with"
            raise SpecError(
                "prompts.source", f"changed prompts in {self._spec.source}", expected, cure
            )
        self._epoch, self._index = int(cursor["epoch"]), int(cursor["index"])
        self._order = self._order_of(self._epoch)

    def take(self, step: int, prompts_per_step: int) -> pa.Table:
        """The next prompts as PROMPTS of `step`: one row a rollout, a prompt's samples together."""
        drawn = [self._next() for _ in range(prompts_per_step)]
        return _table(drawn, step, self._samples, self._spec.source)

    def _next(self) -> Prompt:
        if self._index == len(self._order):
            self._epoch, self._index = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        prompt: Prompt = self._prompts[int(self._order[self._index])]
        self._index += 1
        return prompt

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self._spec.shuffle:
            return np.arange(len(self._prompts))
        rng = np.random.default_rng(derive_seed(self._seed, "prompts", epoch))
        return rng.permutation(len(self._prompts))


def evaluation_prompts(
    entry: EvaluationSpec,
    prompts: PromptsSpec,
    *,
    max_prompt_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
) -> pa.Table:
    """The problems of `entry` as PROMPTS of step 0, `samples` rows a problem, in the file's order.

    They are rendered as the run's prompts: same fields, same chat. Those too long are skipped (with
    a warning) or refused, by `prompts.too_long`.

    Raises:
        SpecError: as PromptSource, or a row without an answer.
    """
    field = f"evaluation.{entry.name}.source"
    renderer = Renderer(prompts, tokenizer, answers_required=True)
    rows = read_rows(entry.source, field)
    problems, skipped = _fitting(rows, renderer, max_prompt_tokens, entry.limit)
    if skipped:
        _log.warning("evaluation %s: %d problems too long, left out", entry.name, skipped)
    if not problems:
        expected = f"some problems of at most {max_prompt_tokens} tokens"
        raise SpecError(field, f"only longer ones in {entry.source}", expected)
    return _table(problems, 0, entry.samples, entry.source)


def first_prompt(prompts: PromptsSpec, tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.int32]:
    """The source's first row as `tokenizer` renders it, whatever its length.

    Raises:
        SpecError: as PromptSource.
    """
    place, row = next(iter(read_rows(prompts.source)))
    return Renderer(prompts, tokenizer).render(place, row).ids


def _fitting(
    rows: Iterable[tuple[str, Row]], renderer: Renderer, max_tokens: int, limit: int | None
) -> tuple[list[Prompt], int]:
    """The first `limit` rows' prompts of at most `max_tokens` tokens, and how many are longer."""
    fitting, skipped = [], 0
    for place, row in islice(rows, limit):
        prompt = renderer.render(place, row)
        if _tokens(prompt) <= max_tokens:
            fitting.append(prompt)
            continue
        if renderer.prompts.too_long == "error":
            found = f"{place}: {_tokens(prompt)} tokens"
            cure = "raise it, or set prompts.too_long to skip"
            raise SpecError("rollout.max_prompt_tokens", found, f"at most {max_tokens}", cure)
        skipped += 1
    return fitting, skipped


def _tokens(prompt: Prompt) -> int:
    theirs = 0 if prompt.teacher_ids is None else len(prompt.teacher_ids)
    return max(len(prompt.ids), theirs)


def _table(drawn: list[Prompt], step: int, samples: int, source: str) -> pa.Table:
    rows = [(slot, sample) for slot in range(len(drawn)) for sample in range(samples)]
    prompts = [drawn[slot] for slot, _ in rows]
    return build(
        PROMPTS,
        {
            "step": [step] * len(rows),
            "slot": [slot for slot, _ in rows],
            "sample_index": [sample for _, sample in rows],
            "attempt": [0] * len(rows),
            "prompt_uid": [prompt.uid for prompt in prompts],
            "prompt_ids": [prompt.ids for prompt in prompts],
            "teacher_prompt_ids": [prompt.teacher_ids for prompt in prompts],
            "answer": [prompt.answer for prompt in prompts],
            "source": [source] * len(rows),
        },
    )
