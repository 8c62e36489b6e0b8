"""RolloutActor: PROMPTS -> ROLLOUTS, and answers to evaluation problems.

A plain class; the pool makes an actor of it. It consumes one PROMPTS table a call, waits for
nobody, and hands responses on as they finish. Weights change only between calls, so one rollout
has one weight version.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tip_ray.compute.scorers import scorer
from tip_ray.contract.errors import DataError, SpecError
from tip_ray.contract.headers import Quarantined, RolloutHeader
from tip_ray.contract.seeds import derive_seed
from tip_ray.contract.spec import EvaluationSpec, RewardSpec, RolloutSpec, StudentSpec
from tip_ray.contract.tables import (
    ANSWERS,
    KEY_COLUMNS,
    PROMPTS,
    build,
    column,
    conform,
    empty,
    keys,
    list_array,
    nbytes,
    offsets,
    rollouts_schema,
)
from tip_ray.runtime.weights import WeightGroup, named_tensors
from tip_ray.stages.engines.base import Engine, EngineConfig, Finished, Request
from tip_ray.stages.models import load_tokenizer, path_on_this_node

MIN_ROWS = 8  # rollouts in one table, but for the last: smaller ones cost more than they carry
NGRAM = 4


class RolloutActor:
    """One replica of the rollout pool: an engine with the student's weights of one version."""

    def __init__(
        self,
        student: StudentSpec,
        rollout: RolloutSpec,
        model_path: str,
        vocab_size: int,
        k: int,
        eos_ids: tuple[int, ...],
        max_model_tokens: int,
        seed: int,
        reward: RewardSpec | None = None,
    ) -> None:
        """Load version 0, the checkpoint directory at `model_path`.

        Args:
            vocab_size: of the shared vocabulary; ids from there on are never sampled.
            k: width of the recorded support.
            max_model_tokens: prompt and response of the longest row, evaluation included.

        Raises:
            SpecError: the model cannot be read, `k` is wider than the vocabulary,
                rollout.engine_args do not fit the engine, or reward.scorer cannot be imported.
        """
        if not 1 <= k <= vocab_size:
            raise SpecError("support.k", str(k), f"1 to the vocabulary's {vocab_size} ids")
        torch.set_num_threads(rollout.num_cpus)
        self._student, self._rollout, self._seed = student, rollout, seed
        scored = reward is not None and reward.scorer is not None
        self._reward = scorer(reward.scorer, "reward.scorer") if scored else None
        self._config = EngineConfig(
            path=path_on_this_node(model_path, student.model, student.revision, "student.model"),
            dtype=student.dtype,
            trust_remote_code=student.trust_remote_code,
            vocab_size=vocab_size,
            k=k,
            eos_ids=eos_ids,
            max_model_tokens=max_model_tokens,
            num_cpus=rollout.num_cpus,
            num_gpus=rollout.num_gpus,
            tensor_parallel=rollout.tensor_parallel,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            engine_args=dict(rollout.engine_args),
        )
        self._engine = make_engine(rollout.engine, self._config)
        self._version = 0
        self._tokenizer: Any = None

    def ping(self) -> str:
        """A sign of life."""
        return f"rollout engine {self._rollout.engine}, weight version {self._version}"

    def load_weights(self, version: int, *groups: WeightGroup) -> int:
        """Adopt the weights of `version`; the version that is loaded now."""
        self._engine.load_weights(named_tensors(groups))
        self._version = version
        return version

    def generate(self, prompts: pa.Table) -> Iterator[RolloutHeader | pa.Table]:
        """Alternately a RolloutHeader and its ROLLOUTS table, as rollouts finish.

        A row that no replica could process comes back in the first header's `quarantined`.

        Raises:
            TableError: `prompts` is not a PROMPTS table.
        """
        prompts = conform(prompts, PROMPTS)
        limit = self._rollout.max_response_tokens
        good, reasons = self._validate(prompts, limit)
        if self._reward is not None:
            reasons |= dict.fromkeys(_unanswered(prompts), "no reference answer to reward")
            good = {row: one for row, one in good.items() if row not in reasons}
        quarantined = _quarantined(prompts, reasons)
        requests = [
            Request(
                index=row,
                prompt_ids=ids,
                seed=derive_seed(self._seed, *key),
                max_response_tokens=limit,
                temperature=self._rollout.temperature,
                top_p=self._rollout.top_p,
                record=True,
            )
            for row, (key, ids) in good.items()
        ]
        with closing(_grouped(self._engine.generate(requests))) as batches:
            for batch, busy_s in batches:
                rewards = self._rewards(prompts, batch)
                table = rollouts_table(prompts, batch, self._version, self._config.k, rewards)
                header = _header(table, batch, self._version, busy_s, quarantined)
                yield replace(header, rewards=tuple(rewards or ()))
                yield table
                quarantined = ()
        if quarantined:
            nothing = empty(rollouts_schema(self._config.k))
            yield _header(nothing, [], self._version, 0.0, quarantined)
            yield nothing

    def evaluate(self, prompts: pa.Table, entry: EvaluationSpec) -> Iterator[pa.Table | None]:
        """ANSWERS, each followed by None: responses decoded and scored against `answer`.

        They are handed on as they finish, a row of `prompts` once, so that a long evaluation
        shows progress; the pool's streams come in pairs, and here nothing heavy follows. Seeds do
        not depend on the step, so evaluations at different steps are paired.

        Raises:
            TableError: `prompts` is not a PROMPTS table.
            DataError: a row cannot be answered or has no reference answer.
        """
        prompts = conform(prompts, PROMPTS)
        good, reasons = self._validate(prompts, entry.max_response_tokens)
        reasons |= dict.fromkeys(_unanswered(prompts), "no reference answer")
        for row, reason in sorted(reasons.items()):
            uid = prompts.column("prompt_uid")[row]
            raise DataError(f"evaluation {entry.name}: prompt {uid}: {reason}")
        requests = [
            Request(
                index=row,
                prompt_ids=ids,
                seed=derive_seed(self._seed, "evaluation", entry.name, slot, sample_index),
                max_response_tokens=entry.max_response_tokens,
                temperature=entry.temperature,
                top_p=1.0,
                record=False,
            )
            for row, ((_, slot, sample_index), ids) in good.items()
        ]
        with closing(_grouped(self._engine.generate(requests))) as batches:
            for finished, _ in batches:
                yield self._answers(prompts, finished, entry)
                yield None

    def _answers(
        self, prompts: pa.Table, finished: Sequence[Finished], entry: EvaluationSpec
    ) -> pa.Table:
        """ANSWERS of `finished`, each with the key of its row in `prompts`."""
        rows = prompts.take(pa.array([one.index for one in finished], pa.int64()))
        score, texts = scorer(entry.scorer), self._texts(finished)
        answers = rows.column("answer").to_pylist()
        columns: dict[str, Any] = {name: rows.column(name) for name in KEY_COLUMNS}
        columns["score"] = [float(score(*pair)) for pair in zip(texts, answers, strict=True)]
        columns["response_tokens"] = [len(one.response_ids) for one in finished]
        columns["truncated"] = [int(one.finish_reason == "length") for one in finished]
        return build(ANSWERS, columns)

    def _rewards(self, prompts: pa.Table, finished: Sequence[Finished]) -> list[float] | None:
        """Of each of `finished`; None without a scorer."""
        if self._reward is None:
            return None
        answers = prompts.column("answer")
        right = [answers[one.index].as_py() for one in finished]
        return [self._reward(*pair) for pair in zip(self._texts(finished), right, strict=True)]

    def _validate(
        self, prompts: pa.Table, max_response_tokens: int
    ) -> tuple[dict[int, tuple[tuple[int, int, int], list[int]]], dict[int, str]]:
        """Row -> (key, prompt ids) of rows that can be processed; row -> reason of the others."""
        good, reasons = {}, {}
        flat, ends = column(prompts, "prompt_ids"), offsets(prompts, "prompt_ids")
        for row, key in enumerate(keys(prompts)):
            ids = flat[ends[row] : ends[row + 1]]
            reason = self._reason_against(ids, max_response_tokens)
            if reason is None:
                good[row] = (key, ids.tolist())
            else:
                reasons[row] = reason
        return good, reasons

    def _reason_against(self, ids: npt.NDArray[Any], max_response_tokens: int) -> str | None:
        if not len(ids):
            return "the prompt is empty"
        if ids.min() < 0 or ids.max() >= self._config.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            return f"token id {wrong} is outside the vocabulary of {self._config.vocab_size}"
        tokens, most = len(ids) + max_response_tokens, self._config.max_model_tokens
        if tokens > most:
            return f"{len(ids)} prompt + {max_response_tokens} response tokens, at most {most}"
        return None

    def _texts(self, finished: Sequence[Finished]) -> list[str]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self._config.path, self._student.trust_remote_code, "student.model"
            )
        return [
            self._tokenizer.decode(
                one.response_ids.tolist(),
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            for one in finished
        ]


def make_engine(name: str, config: EngineConfig) -> Engine:
    """The engine of a spec's `rollout.engine`; its library is imported here and not before."""
    if name == "vllm":
        from tip_ray.stages.engines.vllm import VllmEngine

        return VllmEngine(config)
    from tip_ray.stages.engines.transformers import TransformersEngine

    return TransformersEngine(config)


def rollouts_table(
    prompts: pa.Table,
    finished: Sequence[Finished],
    version: int,
    k: int,
    rewards: Sequence[float] | None = None,
) -> pa.Table:
    """ROLLOUTS of `finished`, each with the key and prompt of its row in `prompts`."""
    schema = rollouts_schema(k)
    rows = prompts.take(pa.array([one.index for one in finished], pa.int64()))
    traces = [one.trace for one in finished if one.trace is not None]
    ends = np.cumsum([0, *(len(one.response_ids) for one in finished)])

    def tokens(name: str, parts: Sequence[npt.NDArray[Any]]) -> pa.ListArray:
        return list_array(np.concatenate(parts), ends, schema.field(name).type)

    columns: dict[str, Any] = {name: rows.column(name) for name in KEY_COLUMNS}
    columns |= {
        "prompt_ids": rows.column("prompt_ids"),
        "teacher_prompt_ids": rows.column("teacher_prompt_ids"),
        "response_ids": tokens("response_ids", [one.response_ids for one in finished]),
        "loss_mask": list_array(np.ones(ends[-1], np.uint8), ends, schema.field("loss_mask").type),
        "student_logprob": tokens("student_logprob", [one.logprob for one in traces]),
        "student_entropy": tokens("student_entropy", [one.entropy for one in traces]),
        "student_topk_ids": tokens("student_topk_ids", [one.topk_ids for one in traces]),
        "student_topk_logprobs": tokens(
            "student_topk_logprobs", [one.topk_logprobs for one in traces]
        ),
        "student_tail_logprob": tokens(
            "student_tail_logprob", [one.tail_logprob for one in traces]
        ),
        "weight_version": [version] * len(finished),
        "finish_reason": [one.finish_reason for one in finished],
        "reward": rewards or [None] * len(finished),
    }
    return build(schema, columns)


def repeated_ngram_fraction(ids: npt.NDArray[Any], n: int = NGRAM) -> float:
    """Of all n-grams of `ids`, the fraction seen earlier in it; 0 when it is shorter than n."""
    grams = list(zip(*(ids[start:].tolist() for start in range(n)), strict=False))
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def _grouped(
    source: Generator[list[Finished], None, None],
) -> Generator[tuple[list[Finished], float], None, None]:
    """At least MIN_ROWS at a time until the end, with the seconds that the engine took."""
    rows: list[Finished] = []
    started = time.perf_counter()
    with closing(source):
        for batch in source:
            rows += batch
            if len(rows) >= MIN_ROWS:
                yield rows, time.perf_counter() - started
                rows, started = [], time.perf_counter()
    if rows:
        yield rows, time.perf_counter() - started


def _unanswered(prompts: pa.Table) -> list[int]:
    answers = prompts.column("answer").to_pylist()
    return [row for row, one in enumerate(answers) if one is None]


def _quarantined(prompts: pa.Table, reasons: dict[int, str]) -> tuple[Quarantined, ...]:
    all_keys, uids = keys(prompts), prompts.column("prompt_uid").to_pylist()
    return tuple(
        Quarantined(all_keys[row], uids[row], "rollout", reason)
        for row, reason in sorted(reasons.items())
    )


def _header(
    table: pa.Table,
    finished: Sequence[Finished],
    version: int,
    busy_s: float,
    quarantined: tuple[Quarantined, ...],
) -> RolloutHeader:
    response_tokens = tuple(len(one.response_ids) for one in finished)
    prompt_tokens = np.diff(offsets(table, "prompt_ids")).tolist()
    return RolloutHeader(
        keys=tuple(keys(table)),
        row_tokens=tuple(a + b for a, b in zip(prompt_tokens, response_tokens, strict=True)),
        response_tokens=response_tokens,
        truncated=tuple(one.finish_reason == "length" for one in finished),
        repeated_ngram_fraction=tuple(
            repeated_ngram_fraction(one.response_ids) for one in finished
        ),
        weight_version=version,
        table_bytes=nbytes(table),
        busy_s=busy_s,
        quarantined=quarantined,
    )
