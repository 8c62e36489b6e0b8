"""SAMPLES with the text of every token beside it."""

from __future__ import annotations

import numpy as np
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
    columns["prompt_text"] = [tokenizer.decode(ids) for ids in columns["prompt_ids"].to_pylist()]
    sources = {f"{model}_top_text": f"{model}_top_ids" for model in ("student", "teacher")}
    for name, source in {"text": "response_ids", **sources}.items():
        ids = columns[source].combine_chunks()
        columns[name] = texts.of(ids, SAMPLES_WITH_TEXT.field(name).type)
    return tables.build(SAMPLES_WITH_TEXT, columns)


class _Texts(dict[int, str]):
    """Each token's text by its id; a step's tokens are few distinct ones, decoded once each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__({-1: ""})  # -1: no such token, the vocabulary is smaller
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = self._tokenizer.decode([token])
        return self[token]

    def of(self, ids: pa.Array, kind: pa.DataType) -> pa.Array:
        """The texts of lists, or of lists of lists, of ids: an array of `kind`, nested alike."""
        if pa.types.is_list(kind):
            lengths = ids.value_lengths().to_numpy(zero_copy_only=False)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            items = self.of(ids.flatten(), kind.value_type)
            return pa.ListArray.from_arrays(pa.array(offsets), items, type=kind)
        if pa.types.is_fixed_size_list(kind):
            items = self.of(ids.flatten(), kind.value_type)
            return pa.FixedSizeListArray.from_arrays(items, type=kind)
        distinct = ids.dictionary_encode()
        texts = [self[token] for token in distinct.dictionary.to_pylist()]
        return pa.array(texts, kind).take(distinct.indices)
