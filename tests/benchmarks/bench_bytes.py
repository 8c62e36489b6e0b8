"""Bytes a response token at every hop, weighed on real tables.

A step of rollouts is made up and goes through the pipeline's own functions: SelectorActor.select,
cut, tables.nbytes; nothing is computed from widths. Beside it stand pipelines that prune nothing:

    rule all       this one without the selector's two hops
    student's ids  as that, but what only scores need, the student's log-probabilities, stays home
    teacher's ids  the teacher's own top K: no support travels to the teacher
    hidden states  the teacher's, of all tokens: nothing of the student's support travels
    full logits    the teacher's, of all tokens, in bfloat16

ROLLOUTS count once, since cut runs where the teacher has read them. SAMPLES, a few rows a step, and
weights go elsewhere and do not count.

    python -m tests.benchmarks.bench_bytes --output outputs/bench

m  response tokens of a row        K  width of the support        d  width of the hidden state
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.benchmarks.common import print_table, write_json
from tip_ray.contract import tables
from tip_ray.contract.spec import LossSpec, SelectionSpec
from tip_ray.stages.cut import cut
from tip_ray.stages.selector import SelectorActor

VOCAB, RANKS, ROWS, RESPONSE_TOKENS = 151_936, 2, 32, 512
HOPS = ("rollout -> teacher", "teacher -> selector", "selector -> cut", "cut -> learner")
SHAPES: tuple[tuple[tables.Targets, int], ...] = (
    ("topk", 16),
    ("topk", 64),
    ("hidden", 1024),
    ("hidden", 4096),
)
SUPPORT_WITH_HIDDEN = 16  # scores are on the student's support whatever the targets
ONLY_FOR_SCORES = ("student_entropy", "student_topk_logprobs", "student_tail_logprob")
STUDENTS_SUPPORT = ("student_topk_ids", *ONLY_FOR_SCORES)


@dataclass
class Step:
    """A step's tables and the tokens of each rollout."""

    rollouts: pa.Table
    scores: pa.Table
    targets: pa.Table
    row_tokens: dict[tables.Key, int]
    response_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--retention", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1])
    parser.add_argument("--prompt-share", type=float, nargs="+", default=[0.0, 0.25, 1.0])
    given = parser.parse_args()
    ours, others = [], []
    for share in given.prompt_share:
        for kind, width in SHAPES:
            step = made_step(kind, width, share)
            what = {"targets": f"{kind} {width}", "prompt/response": share}
            for retention in given.retention:
                hops = _hops(step, retention)
                ours.append(what | {"retention": retention} | hops)
            others += [what | one for one in _unpruned(step, ours[-len(given.retention)])]
        others.append({"targets": "bfloat16", "prompt/response": share} | _full_logits(share))
    figures = _figures(ours, others)
    write_json(given.output, "bytes", {"ours": ours, "unpruned": others, "figures": figures})
    for rows in (_pivot(ours, "retention"), _pivot(others, "pipeline"), figures):
        print_table(rows)
        print()  # noqa: T201


def _hops(step: Step, retention: float) -> dict[str, float]:
    """Bytes a response token at each hop and in sum."""
    rule: dict[str, Any] = {"rule": "all"}
    if retention < 1:
        rule = {"rule": "soft_or", "retention": retention}
    actor = SelectorActor(
        SelectionSpec(**rule), LossSpec(), vocab_size=VOCAB, ranks=RANKS, samples=0, seed=0
    )
    _, keep = actor.select(step.row_tokens, {}, None, step.scores)
    _, _, *selected = cut(range(RANKS), keep, step.scores, step.targets, step.rollouts)
    sent = (
        tables.nbytes(step.rollouts),
        tables.nbytes(step.scores),
        tables.nbytes(keep),
        sum(map(tables.nbytes, selected)),
    )
    each = {hop: one / step.response_tokens for hop, one in zip(HOPS, sent, strict=True)}
    return each | {"sum": sum(each.values())}


def _unpruned(step: Step, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Pipelines without selection, whose learners get what rule all ships: `whole`."""
    to_learner = whole[HOPS[3]]
    without: dict[str, tuple[str, ...]] = {"rule all": ()}
    if "hidden" in whole["targets"]:
        without["hidden states"] = STUDENTS_SUPPORT
    else:
        without |= {"student's ids": ONLY_FOR_SCORES, "teacher's ids": STUDENTS_SUPPORT}
    found = []
    for name, columns in without.items():
        first = tables.nbytes(step.rollouts, columns) / step.response_tokens
        line = {"pipeline": name, HOPS[0]: first, HOPS[3]: to_learner}
        found.append(line | {"sum": first + to_learner})
    return found


def _full_logits(share: float) -> dict[str, Any]:
    """A row's logits of some tokens, weighed, beside its ids."""
    step, count = made_step("topk", 1, share), 8
    kind = tables.rows_of(tables.BFLOAT16, VOCAB)
    logits = tables.list_array(np.zeros((count, VOCAB), np.uint16), [0, count], kind)
    ids_bytes = tables.nbytes(step.rollouts.select(["prompt_ids", "response_ids"]))
    to_learner = logits.nbytes / count + ids_bytes / step.response_tokens
    first = tables.nbytes(step.rollouts, STUDENTS_SUPPORT) / step.response_tokens
    line = {"pipeline": "full logits", HOPS[0]: first, HOPS[3]: to_learner}
    return line | {"sum": first + to_learner}


def made_step(kind: tables.Targets, width: int, prompt_share: float) -> Step:
    """ROLLOUTS, SCORES and TARGETS of random numbers; every response token is a loss token.

    A prompt has at least one token: something must predict the first response token.
    """
    rng = np.random.default_rng(0)
    prompt = max(round(RESPONSE_TOKENS * prompt_share), 1)
    tokens, k = ROWS * RESPONSE_TOKENS, width if kind == "topk" else SUPPORT_WITH_HIDDEN

    def floats(*shape: int) -> np.typing.NDArray[np.float32]:
        return rng.random((tokens, *shape), np.float32)

    def ids(*shape: int) -> np.typing.NDArray[np.int32]:
        return rng.integers(0, VOCAB, (tokens, *shape), np.int32)

    student = {"student_entropy": floats(), "loss_mask": np.ones(tokens, np.uint8)}
    rollouts = _table(
        tables.rollouts_schema(k),
        prompt,
        {
            **student,
            "response_ids": ids(),
            "student_logprob": -floats(),
            "student_topk_ids": ids(k),
            "student_topk_logprobs": -floats(k),
            "student_tail_logprob": -floats(),
        },
    )
    scored = ("reverse_kl", "forward_kl", "teacher_entropy")
    scores = _table(tables.SCORES, prompt, student | {name: floats() for name in scored})
    if kind == "hidden":
        compared: dict[str, Any] = {"teacher_hidden": ids(width).astype(np.uint16)}
    else:
        compared = {"support_ids": ids(width), "teacher_logprobs": -floats(width)}
        compared["teacher_tail_logprob"] = -floats()
    compared |= {"teacher_sampled_logprob": -floats(), "teacher_top_ids": ids(tables.TOP_SHOWN)}
    compared["teacher_top_logprobs"] = -floats(tables.TOP_SHOWN)
    targets = _table(tables.targets_schema(width, kind), prompt, compared)
    row_tokens = dict.fromkeys(tables.keys(scores), prompt + RESPONSE_TOKENS)
    return Step(rollouts, scores, targets, row_tokens, tokens)


def _table(schema: pa.Schema, prompt: int, of_tokens: dict[str, Any]) -> pa.Table:
    """A table with a key and, where the schema has them, what a rollout has once."""
    ends = np.arange(ROWS + 1) * RESPONSE_TOKENS
    columns: dict[str, Any] = {
        name: tables.list_array(flat, ends, schema.field(name).type)
        for name, flat in of_tokens.items()
    }
    of_rows = {
        "step": [1] * ROWS,
        "slot": [row // 4 for row in range(ROWS)],
        "sample_index": [row % 4 for row in range(ROWS)],
        "attempt": [0] * ROWS,
        "prompt_uid": [f"{row // 4:016x}" for row in range(ROWS)],
        "prompt_ids": [[7] * prompt] * ROWS,
        "teacher_prompt_ids": [None] * ROWS,
        "weight_version": [0] * ROWS,
        "finish_reason": ["length"] * ROWS,
        "reward": [None] * ROWS,
    }
    columns |= {name: values for name, values in of_rows.items() if name in schema.names}
    return tables.build(schema, columns)


def _pivot(lines: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Hops at prompt = response / 4, the last one and the sum at each share."""
    shown: dict[tuple[str, Any], dict[str, Any]] = {}
    for one in lines:
        line = shown.setdefault((one["targets"], one[by]), {"targets": one["targets"], by: one[by]})
        if one["prompt/response"] == 0.25:
            line |= {hop: one[hop] for hop in HOPS[:-1] if hop in one}
    for name in (HOPS[-1], "sum"):
        for one in lines:
            line = shown[one["targets"], one[by]]
            line[f"{name}, prompt {one['prompt/response']:g}"] = one[name]
    return list(shown.values())


def _figures(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios that matter most, at prompt = response / 4."""
    sent = {(o["targets"], o["retention"]): o for o in ours if o["prompt/response"] == 0.25}
    unpruned = {(o["targets"], o["pipeline"]): o for o in others if o["prompt/response"] == 0.25}
    lines: list[dict[str, Any]] = []

    def ratio(what: str, ours: float, theirs: float) -> None:
        lines.append({"figure": what, "ours": ours, "other": theirs, "ratio": ours / theirs})

    logits = unpruned["bfloat16", "full logits"][HOPS[3]]
    for (targets, retention), one in sent.items():
        whole, to_learner = sent[targets, 1.0], one[HOPS[3]]
        if retention < 1:
            what = f"{targets} at {retention}"
            ratio(f"{what}: to learners, against unpruned", to_learner, whole[HOPS[3]])
            for (same, name), other in unpruned.items():
                if same == targets:
                    ratio(f"{what}: all hops, against {name}", one["sum"], other["sum"])
        ratio(f"{targets} at {retention}: to learners, against full logits", to_learner, logits)
    return lines


if __name__ == "__main__":
    main()
