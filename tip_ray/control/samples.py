"""SAMPLES with the text of every token beside it."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tip_ray.contract import tables
from tip_ray.control.run_directory import SAMPLES_WITH_TEXT


def with_text(samples: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """`samples` and, per row, the prompt's text, and a string for each token of the response and
    of both models' top 5.

    A token that is only part of a character shows as the decoder shows it, never as nothing.
    """
    texts = _Texts(tokenizer)
    columns = {name: samples.column(name) for name in samples.column_names}
    prompts = [tokenizer.decode(ids) for ids in samples.column("prompt_ids").to_pylist()]
    columns |= {"prompt_text": prompts, "text": texts.of(samples.column("response_ids"))}
    for model in ("student", "teacher"):
        columns[f"{model}_top_text"] = texts.of(samples.column(f"{model}_top_ids"))
    return tables.build(SAMPLES_WITH_TEXT, columns)


class _Texts(dict[int, str]):
    """Each token's text by its id; a step's tokens are few distinct ones, decoded once each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__({-1: ""})  # -1: no such token, the vocabulary is smaller
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = self._tokenizer.decode([token])
        return self[token]

    def of(self, ids: pa.ChunkedArray) -> list[Any]:
        """The texts of a column of lists, or of lists of lists, of ids."""
        return [self._nested(row) for row in ids.to_pylist()]

    def _nested(self, ids: list[Any]) -> list[Any]:
        return [self._nested(item) if isinstance(item, list) else self[item] for item in ids]
