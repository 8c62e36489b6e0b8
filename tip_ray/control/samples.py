"""SAMPLES with the text of every token beside it."""

from __future__ import annotations

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tip_ray.contract import tables
from tip_ray.control.run_directory import SAMPLES_WITH_TEXT


def with_text(samples: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """`samples` and, per row, the prompt's text and a string for each response token.

    A token that is only part of a character shows as the decoder shows it, never as nothing.
    """
    responses = samples.column("response_ids").to_pylist()
    texts = [[tokenizer.decode([token]) for token in response] for response in responses]
    prompts = [tokenizer.decode(ids) for ids in samples.column("prompt_ids").to_pylist()]
    columns = {name: samples.column(name) for name in samples.column_names}
    columns |= {"text": texts, "prompt_text": prompts}
    return tables.build(SAMPLES_WITH_TEXT, columns)
