"""TeacherActor: ROLLOUTS -> SCORES, TARGETS.

The trunk (engines/trunk.py) reads whole rows; the LM head then runs on response positions only, a
few rows of logits at a time, and is the same for every trunk. The logits at input t - 1 predict
token t.

N  response tokens          C  tokens of one chunk          D  width of a hidden state
K  student's support        V  shared vocabulary
W  target support: K, or 2K for a union, with id -1 = padding

With targets hidden the hidden states themselves are TARGETS, rounded to bfloat16; SCORES are those
of the states as they are, on the student's support, as always.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tip_ray.compute.divergence import (
    drop_ids_,
    row_statistics,
    support_divergence,
    tail_logprob,
)
from tip_ray.compute.packing import to_tensor
from tip_ray.contract import tables
from tip_ray.contract.headers import Quarantined, TeacherHeader
from tip_ray.contract.spec import TeacherSpec
from tip_ray.contract.tables import SCORES, TOP_SHOWN, column, offsets
from tip_ray.stages.data_errors import quarantine, refusals, rows_of, without_rows
from tip_ray.stages.engines.trunk import Row, make_trunk
from tip_ray.stages.models import path_on_this_node

FloatArray = npt.NDArray[np.float32]


class _Student(NamedTuple):
    """What the teacher is compared with at some tokens; harmless numbers where loss_mask is 0."""

    sampled_ids_N: Tensor
    topk_ids_NK: Tensor
    topk_logprobs_NK: Tensor
    tail_N: Tensor

    def chunk(self, rows: slice | Tensor, device: torch.device) -> _Student:
        return _Student(*(one[rows].to(device) for one in self))


class _Scored(NamedTuple):
    """The teacher's numbers at some tokens, in nats."""

    support_ids_NW: Tensor
    logprobs_NW: Tensor
    tail_N: Tensor
    hidden_ND: Tensor  # bfloat16; D is 0 with targets topk
    sampled_N: Tensor
    top_ids_N5: Tensor
    top_logprobs_N5: Tensor
    entropy_N: Tensor
    reverse_kl_N: Tensor
    forward_kl_N: Tensor
    mass_N: Tensor  # the teacher's probability on the student's support
    finite_N: Tensor  # bool

    def in_order_of(self, tokens_N: Tensor) -> _Scored:
        """These numbers, which belong to the tokens `tokens_N`, by ascending token."""
        back_N = torch.argsort(tokens_N)
        return _Scored(*(one[back_N] for one in self))


class TeacherActor:
    """One teacher replica: holds the model, keeps nothing between calls.

    Args:
        teacher: its part of the spec.
        model_path: the local checkpoint directory that the driver resolved.
        vocab_size: V, shared with the student.
        k: K, at most V.
        support_source: whose top-K the targets are on: student | teacher | union.
        tail_floor_nats: floor of both tails' log-mass in the divergences.
        max_row_tokens: prompt and response of the longest row; engine vllm makes room for it.

    Raises:
        SpecError: the model cannot be loaded, does not fit the replica's devices, or
            teacher.engine_args do not fit the engine.
    """

    def __init__(
        self,
        teacher: TeacherSpec,
        model_path: str,
        vocab_size: int,
        k: int,
        support_source: str,
        tail_floor_nats: float,
        max_row_tokens: int,
    ) -> None:
        torch.set_num_threads(teacher.num_cpus)
        self._spec, self._k, self._vocab_size = teacher, k, vocab_size
        # The student's support is scored anyway: with targets hidden no other is needed.
        self._source = "student" if teacher.targets == "hidden" else support_source
        self._floor = tail_floor_nats
        path = path_on_this_node(model_path, teacher.model, teacher.revision, "teacher.model")
        self._trunk = make_trunk(teacher, path, vocab_size, max_row_tokens)
        self._head_VD = self._trunk.head_VD

    def ping(self) -> None:
        """Answer that the actor is alive."""

    def score(self, *rollouts: pa.Table) -> tuple[TeacherHeader, pa.Table, pa.Table]:
        """Score all rows of some ROLLOUTS tables: (header, SCORES, TARGETS), in their order.

        A row that no replica could score is named in the header's `quarantined` and is absent
        from both tables. Where loss_mask is 0, the numbers of SCORES are 0.

        Raises:
            TableError: a table does not conform, or its token columns differ in length.
        """
        started = time.perf_counter()
        table = tables.concat(rollouts, tables.rollouts_schema(self._k))
        reasons = refusals(table, self._vocab_size, self._trunk.max_row_tokens)
        quarantined = [quarantine(table, row, reason) for row, reason in reasons.items()]
        table = without_rows(table, list(reasons))

        scored = self._score_tokens(table)
        poisoned = rows_of(table, (column(table, "loss_mask") == 1) & ~scored.finite_N.numpy())
        quarantined += [
            quarantine(table, row, "the teacher's log-probabilities are not finite")
            for row in poisoned
        ]
        scored, table = _without_tokens(table, scored, poisoned), without_rows(table, poisoned)
        scores = _scores_table(table, scored)
        targets = _targets_table(table, scored, self._spec.targets)
        header = _header(table, scored, scores, quarantined, time.perf_counter() - started)
        return header, scores, targets

    @torch.inference_mode()
    def _score_tokens(self, table: pa.Table) -> _Scored:
        """All response tokens of `table`, in its order, on the CPU."""
        student = _student_numbers(table)
        starts, (indices, rows) = offsets(table, "response_ids"), _trunk_rows(table)
        parts, order = [], []
        with closing(self._trunk.hidden_states(rows)) as batches:
            for places, hidden_ND in batches:
                tokens_N = _tokens_of([indices[place] for place in places], starts)
                order.append(tokens_N)
                for start in range(0, len(tokens_N), self._spec.chunk_rows):
                    part = slice(start, start + self._spec.chunk_rows)
                    chunk = student.chunk(tokens_N[part], self._head_VD.device)
                    parts.append(self._score_chunk(hidden_ND[part], chunk))
        if not parts:  # no row, or none with a response
            nothing_ND = self._head_VD.new_empty((0, self._head_VD.shape[1]))
            return self._score_chunk(nothing_ND, student.chunk(slice(0), nothing_ND.device))
        whole = _Scored(*(torch.cat(one) for one in zip(*parts, strict=True)))
        return whole.in_order_of(torch.cat(order))

    def _score_chunk(self, hidden_CD: Tensor, student: _Student) -> _Scored:
        logits_CV = head_logits(hidden_CD, self._head_VD)
        top = min(max(self._k, TOP_SHOWN), self._vocab_size)
        statistics = row_statistics(logits_CV, top, self._vocab_size)
        logprobs_CV = logits_CV.sub_(statistics.log_normalizer_N[:, None])
        on_student_CK = logprobs_CV.gather(1, student.topk_ids_NK)
        sampled_C = logprobs_CV.gather(1, student.sampled_ids_N[:, None]).squeeze(1)
        support_ids_CW = self._support(student.topk_ids_NK, statistics.topk_ids_NK[:, : self._k])
        on_support_CW = _gather_padded(logprobs_CV, support_ids_CW)
        own_tail_C = (
            None if self._source == "student" else tail_logprob(logprobs_CV, support_ids_CW)
        )
        # In place and last: the log-probabilities are not read again.
        student_tail_C = drop_ids_(logprobs_CV, student.topk_ids_NK).logsumexp(-1)
        support_tail_C = student_tail_C if own_tail_C is None else own_tail_C
        reverse_C, forward_C = support_divergence(
            student.topk_logprobs_NK, student.tail_N, on_student_CK, student_tail_C, self._floor
        )
        width = hidden_CD.shape[1] if self._spec.targets == "hidden" else 0
        shipped_CD = hidden_CD[:, :width].to(torch.bfloat16)
        finite_C = on_student_CK.isfinite().all(1) & sampled_C.isfinite() & ~support_tail_C.isnan()
        finite_C &= shipped_CD.isfinite().all(1)
        scored = _Scored(
            support_ids_CW,
            on_support_CW,
            support_tail_C,
            shipped_CD,
            sampled_C,
            _padded(statistics.topk_ids_NK[:, :TOP_SHOWN], -1),
            _padded(statistics.topk_logprobs_NK[:, :TOP_SHOWN], -torch.inf),
            statistics.entropy_N,
            reverse_C,
            forward_C,
            on_student_CK.exp().sum(1),
            finite_C & statistics.entropy_N.isfinite() & (reverse_C + forward_C).isfinite(),
        )
        return _Scored(*(one.cpu() for one in scored))

    def _support(self, student_ids_CK: Tensor, teacher_ids_CK: Tensor) -> Tensor:
        if self._source == "student":
            return student_ids_CK
        if self._source == "teacher":
            return teacher_ids_CK
        known_CK = (teacher_ids_CK[:, :, None] == student_ids_CK[:, None, :]).any(-1)
        return torch.cat([student_ids_CK, teacher_ids_CK.masked_fill(known_CK, -1)], dim=1)


def head_logits(hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
    """Logits [C, V] in float32."""
    return (hidden_CD @ head_VD.T).float()


def _student_numbers(table: pa.Table) -> _Student:
    loss_N = torch.from_numpy(column(table, "loss_mask") == 1)

    def safe(name: str, dtype: torch.dtype) -> Tensor:
        values = to_tensor(column(table, name), dtype)
        return values.masked_fill(~loss_N.view(-1, *[1] * (values.ndim - 1)), 0)

    return _Student(
        torch.from_numpy(column(table, "response_ids").astype(np.int64)),
        safe("student_topk_ids", torch.int64),
        safe("student_topk_logprobs", torch.float32),
        safe("student_tail_logprob", torch.float32),
    )


def _trunk_rows(table: pa.Table) -> tuple[list[int], list[Row]]:
    """What the trunk reads of each row that has a response, and that row's index in `table`."""
    starts, response_ids = offsets(table, "response_ids"), column(table, "response_ids")
    indices, rows = [], []
    for index in np.flatnonzero(np.diff(starts)).tolist():
        prompt = table.column("teacher_prompt_ids")[index]
        if not prompt.is_valid:
            prompt = table.column("prompt_ids")[index]
        start, end = starts[index], starts[index + 1]
        # The last token predicts nothing.
        ids = np.concatenate([prompt.values.to_numpy(), response_ids[start : end - 1]])
        indices.append(index)
        rows.append(Row(ids.astype(np.int64), int(end - start)))
    return indices, rows


def _tokens_of(rows: Sequence[int], starts: npt.NDArray[np.int64]) -> Tensor:
    """Indices of the response tokens of some rows, row after row."""
    return torch.from_numpy(
        np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
    )


def _gather_padded(logprobs_CV: Tensor, ids_CW: Tensor) -> Tensor:
    return logprobs_CV.gather(1, ids_CW.clamp(min=0)).masked_fill_(ids_CW < 0, -torch.inf)


def _padded(values_CJ: Tensor, fill: float) -> Tensor:
    missing = TOP_SHOWN - values_CJ.shape[1]
    return torch.nn.functional.pad(values_CJ, (0, missing), value=fill)


def _without_tokens(table: pa.Table, scored: _Scored, rows: Sequence[int]) -> _Scored:
    """`scored`, which belongs to `table`, without the tokens of some rows."""
    if not rows:
        return scored
    keep = np.isin(np.arange(table.num_rows), rows, invert=True)
    keep_N = torch.from_numpy(keep.repeat(np.diff(offsets(table, "response_ids"))))
    return _Scored(*(one[keep_N] for one in scored))


def _scores_table(table: pa.Table, scored: _Scored) -> pa.Table:
    mask_N = column(table, "loss_mask")

    def masked(values_N: FloatArray) -> FloatArray:
        return np.where(mask_N == 1, values_N, np.float32(0))

    return _token_table(
        table,
        SCORES,
        {
            "student_entropy": masked(column(table, "student_entropy")),
            "reverse_kl": masked(scored.reverse_kl_N.numpy()),
            "forward_kl": masked(scored.forward_kl_N.numpy()),
            "teacher_entropy": masked(scored.entropy_N.numpy()),
            "loss_mask": mask_N,
        },
    )


def _targets_table(table: pa.Table, scored: _Scored, targets: tables.Targets) -> pa.Table:
    if targets == "hidden":
        values_ND = scored.hidden_ND.view(torch.uint16).numpy()
        width, compared = values_ND.shape[1], {"teacher_hidden": values_ND}
    else:
        width = scored.support_ids_NW.shape[1]
        compared = {
            "support_ids": scored.support_ids_NW.numpy().astype(np.int32),
            "teacher_logprobs": scored.logprobs_NW.numpy(),
            "teacher_tail_logprob": scored.tail_N.numpy(),
        }
    return _token_table(
        table,
        tables.targets_schema(width, targets),
        {
            **compared,
            "teacher_sampled_logprob": scored.sampled_N.numpy(),
            "teacher_top_ids": scored.top_ids_N5.numpy().astype(np.int32),
            "teacher_top_logprobs": scored.top_logprobs_N5.numpy(),
        },
    )


def _token_table(
    table: pa.Table, schema: pa.Schema, values: dict[str, npt.NDArray[np.generic]]
) -> pa.Table:
    """A table of `schema` with the key of `table` and a value for each of its response tokens."""
    starts = offsets(table, "response_ids")
    columns = {name: table.column(name) for name in tables.KEY_COLUMNS}
    for name, flat in values.items():
        columns[name] = tables.list_array(flat, starts, schema.field(name).type)
    return tables.build(schema, columns)


def _header(
    table: pa.Table,
    scored: _Scored,
    scores: pa.Table,
    quarantined: list[Quarantined],
    busy_s: float,
) -> TeacherHeader:
    loss_N = column(table, "loss_mask") == 1
    student_mass_N = np.exp(column(table, "student_topk_logprobs")[loss_N], dtype=np.float64).sum(1)
    return TeacherHeader(
        keys=tuple(tables.keys(table)),
        loss_tokens=int(loss_N.sum()),
        student_mass_sum=float(student_mass_N.sum()),
        teacher_mass_sum=float(scored.mass_N.numpy()[loss_N].sum(dtype=np.float64)),
        scores_bytes=tables.nbytes(scores),
        busy_s=busy_s,
        quarantined=tuple(quarantined),
    )
