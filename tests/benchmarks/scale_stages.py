"""Stages that sleep and make tables of true size: what the simulation has in the place of models.

They have the methods of RolloutActor, TeacherActor and LearnerActor, check what they are given with
the same functions, and answer with tables of the real schemas. Their contents are slices of files
that all processes of the machine map, so that making a table costs little beside copying it into
the object store, and a replica little memory. Torch is not imported, for the same reason.

T  tokens of the files    K  width of the student's support    D  width of the hidden state
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tip_ray.contract import tables
from tip_ray.contract.headers import LearnerReport, RolloutHeader, TeacherHeader
from tip_ray.stages.data_errors import refusals

MIN_ROWS = 8  # rollouts in one table, as the rollout stage's own
VOCAB = 151_936
_LOAD, _STRIDE = "load.json", 7919  # a prime: ids of a row differ
Values = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Load:
    """What one step is made of; read anew at each call, so that warm pools serve several loads.

    Seconds are those of a whole step on one replica: n replicas take an n-th.
    """

    rows: int
    response_tokens: int
    rollout_s: float
    teacher_s: float
    learner_s: float

    def put(self, directory: Path) -> None:
        (directory / _LOAD).write_text(json.dumps(asdict(self)), encoding="ascii")

    @classmethod
    def read(cls, directory: Path) -> Load:
        return cls(**json.loads((directory / _LOAD).read_text(encoding="ascii")))


@dataclass(frozen=True)
class Made:
    """Where the contents of tables lie, and what the weights weigh."""

    directory: Path
    weight_groups: int = 36
    group_bytes: int = 1 << 20


@dataclass(frozen=True)
class Saved:
    """A checkpoint's file, of which nothing was written."""

    name: str
    nbytes: int = 0
    sha256: str = "0" * 64


def make_contents(directory: Path, tokens: int, k: int, hidden: int = 0) -> None:
    """Write what tables of up to `tokens` tokens are filled with, a file a column."""
    rng = np.random.default_rng(0)
    start_T = rng.integers(0, VOCAB, tokens, dtype=np.int64)
    ids_TK = ((start_T[:, None] + _STRIDE * np.arange(k)) % VOCAB).astype(np.int32)
    logprobs_TK = -rng.gamma(2.0, 2.0, (tokens, k)).astype(np.float32)
    columns = {
        "ids": ids_TK,
        "logprobs": logprobs_TK,
        "top_ids": np.ascontiguousarray(ids_TK[:, : tables.TOP_SHOWN]),
        "top_logprobs": np.ascontiguousarray(logprobs_TK[:, : tables.TOP_SHOWN]),
        "sampled": start_T.astype(np.int32),
        "logprob": np.ascontiguousarray(logprobs_TK[:, 0]),
        "ones": np.ones(tokens, np.uint8),
    }
    scales = {"entropy": 1.0, "reverse_kl": 0.3, "forward_kl": 0.4, "teacher_entropy": 0.9}
    for name, scale in scales.items():  # skewed, as of a student near its teacher
        columns[name] = rng.gamma(0.3, scale, tokens).astype(np.float32).clip(max=11.0)
    if hidden:
        columns["hidden"] = rng.integers(0, 1 << 16, (tokens, hidden), dtype=np.uint16)
    for name, values in columns.items():
        np.save(directory / f"{name}.npy", values)


class _Sleeping:
    """`made` is set by `sleeping`."""

    made: Made

    def contents(self, name: str, tokens: int) -> npt.NDArray[Any]:
        """[tokens, ...] of a column, mapped."""
        values: npt.NDArray[Any] = np.load(self.made.directory / f"{name}.npy", mmap_mode="r")
        return values[:tokens]

    def load(self) -> Load:
        return Load.read(self.made.directory)


def sleeping(stage: type[_Sleeping], made: Made) -> type:
    """`stage` as a class of its own that knows where its tables' contents lie."""
    return type(stage.__name__, (stage,), {"made": made})


class SleepingRollout(_Sleeping):
    """PROMPTS -> ROLLOUTS, MIN_ROWS at a time, every response equally long."""

    def __init__(self, *_: Any, k: int, **__: Any) -> None:
        self._k, self._version = k, 0

    def load_weights(self, version: int, *groups: npt.NDArray[np.uint8]) -> int:
        assert len(groups) == self.made.weight_groups
        self._version = version
        return version

    def generate(self, prompts: pa.Table) -> Iterator[RolloutHeader | pa.Table]:
        load = self.load()
        prompts = tables.conform(prompts, tables.PROMPTS)
        for start in range(0, prompts.num_rows, MIN_ROWS):
            began, own = time.perf_counter(), prompts.slice(start, MIN_ROWS)
            time.sleep(load.rollout_s * own.num_rows / load.rows)
            table = self._table(own, load.response_tokens)
            yield self._header(table, time.perf_counter() - began)
            yield table

    def _table(self, prompts: pa.Table, response_tokens: int) -> pa.Table:
        rows, ends = prompts.num_rows, np.arange(prompts.num_rows + 1) * response_tokens
        columns = {
            "response_ids": "sampled",
            "loss_mask": "ones",
            "student_logprob": "logprob",
            "student_entropy": "entropy",
            "student_topk_ids": "ids",
            "student_topk_logprobs": "logprobs",
            "student_tail_logprob": "logprob",
        }
        rest = {name: prompts.column(name) for name in ("prompt_ids", "teacher_prompt_ids")}
        rest |= {"weight_version": [self._version] * rows, "finish_reason": ["length"] * rows}
        rest["reward"] = [None] * rows
        values = {name: self.contents(own, ends[-1]) for name, own in columns.items()}
        return _filled(tables.rollouts_schema(self._k), prompts, ends, values, rest)

    def _header(self, table: pa.Table, busy_s: float) -> RolloutHeader:
        lengths = np.diff(tables.offsets(table, "response_ids"))
        whole = lengths + np.diff(tables.offsets(table, "prompt_ids"))
        return RolloutHeader(
            keys=tuple(tables.keys(table)),
            row_tokens=tuple(whole.tolist()),
            response_tokens=tuple(lengths.tolist()),
            truncated=(True,) * table.num_rows,
            repeated_ngram_fraction=(0.0,) * table.num_rows,
            weight_version=self._version,
            table_bytes=tables.nbytes(table),
            busy_s=busy_s,
        )


class SleepingTeacher(_Sleeping):
    """ROLLOUTS -> SCORES, TARGETS; what comes in is joined and checked as the real one does."""

    def __init__(self, spec: Any, *_: Any, vocab_size: int, k: int, **__: Any) -> None:
        self._targets: tables.Targets = spec.targets
        self._vocab_size, self._k = vocab_size, k

    def score(self, *rollouts: pa.Table) -> tuple[TeacherHeader, pa.Table, pa.Table]:
        began, load = time.perf_counter(), self.load()
        table = tables.concat(rollouts, tables.rollouts_schema(self._k))
        assert not refusals(table, self._vocab_size)
        time.sleep(load.teacher_s * table.num_rows / load.rows)
        ends = tables.offsets(table, "response_ids")
        scores = _filled(tables.SCORES, table, ends, self._scores(table, ends[-1]))
        targets, schema = self._target_values(ends[-1])
        heavy = _filled(schema, table, ends, targets)
        header = TeacherHeader(
            keys=tuple(tables.keys(table)),
            loss_tokens=int(ends[-1]),
            student_mass_sum=float(ends[-1]),
            teacher_mass_sum=float(ends[-1]),
            scores_bytes=tables.nbytes(scores),
            busy_s=time.perf_counter() - began,
        )
        return header, scores, heavy

    def _scores(self, table: pa.Table, tokens: int) -> Values:
        names = ("reverse_kl", "forward_kl", "teacher_entropy")
        return {
            "student_entropy": tables.column(table, "student_entropy"),
            "loss_mask": tables.column(table, "loss_mask"),
            **{name: self.contents(name, tokens) for name in names},
        }

    def _target_values(self, tokens: int) -> tuple[Values, pa.Schema]:
        if self._targets == "hidden":
            columns = {"teacher_hidden": "hidden"}
        else:
            columns = {"support_ids": "ids", "teacher_logprobs": "logprobs"}
            columns["teacher_tail_logprob"] = "logprob"
        columns |= {"teacher_sampled_logprob": "logprob", "teacher_top_ids": "top_ids"}
        columns["teacher_top_logprobs"] = "top_logprobs"
        values = {name: self.contents(own, tokens) for name, own in columns.items()}
        width = next(iter(values.values())).shape[1]
        return values, tables.targets_schema(width, self._targets)


class SleepingLearner(_Sleeping):
    """SELECTED -> a report; rank 0 gives weights, which nobody computed."""

    def __init__(self, *_: Any, width: int, rank: int, teacher: Any, **__: Any) -> None:
        self._schema = tables.selected_schema(width, "hidden" if teacher else "topk")
        self._rank = rank

    def open_port(self) -> int:
        return 0

    def join(self, host: str, *_: int) -> None:
        assert host

    def train_step(self, step: int, *selected: pa.Table) -> LearnerReport:
        began, load = time.perf_counter(), self.load()
        assert all(one.num_rows for one in selected)  # no table is made in vain
        table = tables.newest_attempts(tables.concat(selected, self._schema))
        time.sleep(load.learner_s * table.num_rows / load.rows)
        return LearnerReport(
            step=step,
            loss=0.0,
            grad_norm=0.0,
            learning_rate=0.0,
            skipped=False,
            tokens=len(tables.column(table, "input_ids")),
            kept=len(tables.column(table, "kept_positions")),
            logprob_gap_sum=0.0,
            logprob_gap_max=0.0,
            peak_bytes=0,
            busy_s=time.perf_counter() - began,
            trained=tables.tried(table),
        )

    def publish(self, version: int) -> Iterator[int | npt.NDArray[np.uint8]]:
        if self._rank == 0:
            for group in range(self.made.weight_groups):
                yield self.made.group_bytes
                yield np.full(self.made.group_bytes, (version + group) % 256, np.uint8)

    def save(self, *_: object) -> Saved:
        return Saved(f"learner-{self._rank + 1:05d}-of-{self._rank + 1:05d}.safetensors")


def _filled(
    schema: pa.Schema,
    keyed: pa.Table,
    ends: npt.NDArray[Any],
    values: Values,
    rest: Mapping[str, Any] | None = None,
) -> pa.Table:
    """A table of `schema`: the key of `keyed`, a value for each token, and whole columns."""
    columns: dict[str, Any] = {name: keyed.column(name) for name in tables.KEY_COLUMNS}
    for name, flat in values.items():
        columns[name] = tables.list_array(flat, ends, schema.field(name).type)
    return tables.build(schema, columns | dict(rest or {}))
