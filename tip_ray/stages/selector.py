"""SCORES -> KEEP: which tokens of the step the learner sees, with which weight, on which rank.

The selector is the step's barrier: normalisation is over the whole step, so it decides once all
scores are there. It holds no state between steps, so a replacement needs none; the thresholds
frozen at step 1 come with each call. `cut.py` applies KEEP where the heavy half lies.

N  loss tokens of the step        T  response tokens of the step        R  rows (rollouts)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tip_ray.compute.rewards import rollout_weights
from tip_ray.compute.rules import find_rule, quantile_lower
from tip_ray.compute.selection import (
    balance_rows,
    loss_weights,
    normalised_entropy,
    quadrant_thresholds,
    quadrants,
    select_weighted,
)
from tip_ray.contract import tables
from tip_ray.contract.errors import TableError
from tip_ray.contract.headers import QuadrantThresholds, SelectionHeader
from tip_ray.contract.spec import LossSpec, SelectionSpec
from tip_ray.contract.tables import Key
from tip_ray.stages.data_errors import check_scores

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Step:
    """The step's scores: the loss tokens' values, and where they lie in their rows."""

    table: pa.Table
    keys: list[Key]  # [R]
    offsets: npt.NDArray[np.int64]  # [R + 1] into response tokens
    is_loss: npt.NDArray[np.bool_]  # [T]
    loss_offsets: npt.NDArray[np.int64]  # [R + 1] into loss tokens
    entropy: npt.NDArray[np.float64]  # [N] normalised to [0, 1]
    student_entropy: FloatArray  # [N] nats
    reverse_kl: FloatArray  # [N] nats
    forward_kl: FloatArray  # [N] nats
    teacher_entropy: FloatArray  # [N] nats


class SelectorActor:
    """Decides for whole steps.

    Args:
        vocab_size: of the shared vocabulary; entropy is normalised by its logarithm.
        ranks: learner ranks that rows are spread over.
        samples: rows a step that are marked to be shown.

    Raises:
        SpecError: the rule is the user's own and cannot be imported here.
    """

    def __init__(
        self,
        selection: SelectionSpec,
        loss: LossSpec,
        *,
        vocab_size: int,
        ranks: int,
        samples: int,
        seed: int,
    ) -> None:
        find_rule(selection.rule)
        self._selection, self._loss, self._seed = selection, loss, seed
        self._vocab_size, self._ranks, self._samples = vocab_size, ranks, samples

    def select(
        self,
        row_tokens: Mapping[Key, int],
        rewards: Mapping[Key, float],
        frozen: QuadrantThresholds | None,
        *scores: pa.Table,
    ) -> tuple[SelectionHeader, pa.Table]:
        """KEEP for one step.

        Args:
            row_tokens: prompt and response tokens of every rollout that must be decided on.
            rewards: of every such rollout, where loss.reward_weight or loss.sample_weight asks.
            frozen: thresholds of step 1; None at step 1, whose own become the frozen ones.
            scores: SCORES tables in any order; repeats of a key are dropped.

        Raises:
            TableError: scores of a rollout are missing, or of a rollout nobody asked for, or their
                columns differ in length.
            DataError: a loss token's score is NaN or infinite.
        """
        began = time.perf_counter()
        table = tables.newest_attempts(tables.concat(scores, tables.SCORES))
        check_scores(table)
        step = self._read(table)
        _check_complete(step.keys, row_tokens)
        keep_N, weight_N = select_weighted(
            self._selection,
            step.entropy,
            step.reverse_kl,
            step.forward_kl,
            step.loss_offsets,
            seed=self._seed,
            row_keys=step.keys,
            teacher_entropy_N=step.teacher_entropy,
        )
        coefficient_N = loss_weights(
            keep_N,
            weight_N,
            step.loss_offsets,
            self._loss.normalize,
            divide_by="all" if self._selection.reweight == "inclusion" else "kept",
        )
        coefficient_N *= self._rollout_weights(step, rewards)
        quantiles = self._selection.quadrant_quantiles
        own = quadrant_thresholds(step.entropy, step.reverse_kl, quantiles)
        quadrant_N = quadrants(step.entropy, step.reverse_kl, own.entropy, own.divergence)
        keep = self._keep_table(step, keep_N, coefficient_N, quadrant_N, row_tokens)
        header = self._header(step, int(keep_N.sum()), quadrant_N, frozen or own, keep, began)
        return header, keep

    def _rollout_weights(self, step: _Step, rewards: Mapping[Key, float]) -> FloatArray:
        """[N] what each token's rollout weighs; divisors count tokens, whatever they weigh."""
        loss, keys = self._loss, step.keys
        if loss.reward_weight == 0 and loss.sample_weight == "none":
            return np.ones(len(step.entropy), np.float32)
        unknown = [key for key in keys if key not in rewards]
        if unknown:
            raise TableError(
                f"no reward of (step, slot, sample_index) {unknown[0]}; every rollout needs one"
            )
        weight_R = rollout_weights(
            loss, [rewards[key] for key in keys], [slot for _, slot, _ in keys]
        )
        return np.repeat(weight_R, np.diff(step.loss_offsets)).astype(np.float32)

    def _read(self, table: pa.Table) -> _Step:
        offsets = tables.offsets(table, "loss_mask")
        is_loss = tables.column(table, "loss_mask") != 0
        loss_before = np.concatenate([[0], np.cumsum(is_loss)])
        values = {
            name: tables.column(table, name)[is_loss]
            for name in ("student_entropy", "reverse_kl", "forward_kl", "teacher_entropy")
        }
        entropy = normalised_entropy(values["student_entropy"], self._vocab_size)
        loss_offsets = loss_before[offsets]
        return _Step(table, tables.keys(table), offsets, is_loss, loss_offsets, entropy, **values)

    def _keep_table(
        self,
        step: _Step,
        keep_N: npt.NDArray[np.bool_],
        coefficient_N: FloatArray,
        quadrant_N: npt.NDArray[np.uint8],
        row_tokens: Mapping[Key, int],
    ) -> pa.Table:
        keep_T = np.zeros(len(step.is_loss), bool)
        keep_T[step.is_loss] = keep_N
        quadrant_T = np.zeros(len(step.is_loss), np.uint8)
        quadrant_T[step.is_loss] = quadrant_N
        kept_before = np.concatenate([[0], np.cumsum(keep_T)])
        kept_offsets = kept_before[step.offsets]
        row_of_T = np.repeat(np.arange(step.table.num_rows), np.diff(step.offsets))
        position_T = np.arange(len(step.is_loss)) - step.offsets[row_of_T]
        columns: dict[str, Any] = {name: step.table.column(name) for name in tables.KEY_COLUMNS}
        kept = position_T[keep_T].astype(np.int32)
        columns["kept"] = tables.list_array(kept, kept_offsets, _type("kept"))
        weight = coefficient_N[keep_N].astype(np.float32)
        columns["weight"] = tables.list_array(weight, kept_offsets, _type("weight"))
        columns["quadrant"] = tables.list_array(quadrant_T, step.offsets, _type("quadrant"))
        columns["rank"] = self._ranks_of_rows(step, kept, weight, kept_offsets, row_tokens)
        columns["shown"] = _evenly(step.table.num_rows, self._samples)
        return tables.build(tables.KEEP, columns)

    def _ranks_of_rows(
        self,
        step: _Step,
        kept: npt.NDArray[np.int32],
        weight: FloatArray,
        kept_offsets: npt.NDArray[np.int64],
        row_tokens: Mapping[Key, int],
    ) -> npt.NDArray[np.int32]:
        """[R]: balanced by the inputs a row still needs; -1 where nothing of it has any weight."""
        rows = np.flatnonzero(np.diff(np.concatenate([[0], np.cumsum(weight != 0)])[kept_offsets]))
        whole = np.array([row_tokens[key] for key in step.keys], np.int64)
        prompt = whole - np.diff(step.offsets)
        inputs = prompt[rows] + kept[kept_offsets[rows + 1] - 1]
        ranks = np.full(step.table.num_rows, -1, np.int32)
        ranks[rows] = balance_rows(inputs, self._ranks)
        return ranks

    def _header(
        self,
        step: _Step,
        kept: int,
        quadrant_N: npt.NDArray[np.uint8],
        frozen: QuadrantThresholds,
        keep: pa.Table,
        began: float,
    ) -> SelectionHeader:
        frozen_N = quadrants(step.entropy, step.reverse_kl, frozen.entropy, frozen.divergence)
        any_tokens = len(step.entropy) > 0
        return SelectionHeader(
            loss_tokens=len(step.entropy),
            kept_tokens=kept,
            student_entropy_mean=_mean(step.student_entropy),
            teacher_entropy_mean=_mean(step.teacher_entropy),
            reverse_kl_mean=_mean(step.reverse_kl),
            reverse_kl_p98=float(quantile_lower(step.reverse_kl, 0.98)) if any_tokens else 0.0,
            reverse_kl_max=float(step.reverse_kl.max(initial=0.0)),
            forward_kl_mean=_mean(step.forward_kl),
            quadrant_shares=_shares(quadrant_N),
            frozen_shares=_shares(frozen_N),
            frozen_thresholds=frozen,
            keep_bytes=tables.nbytes(keep),
            busy_s=time.perf_counter() - began,
            weight_sum=float(tables.column(keep, "weight").sum(dtype=np.float64)),
            nothing_kept=tables.tried(keep.take(np.flatnonzero(tables.column(keep, "rank") < 0))),
            rank_of=dict(zip(step.keys, tables.column(keep, "rank").tolist(), strict=True)),
        )


def _check_complete(found: list[Key], expected: Mapping[Key, int]) -> None:
    missing = expected.keys() - (scored := set(found))
    unasked = scored - expected.keys()
    if missing or unasked:
        which, key = ("no scores of", min(missing)) if missing else ("unasked", min(unasked))
        raise TableError(
            f"SCORES: {which} (step, slot, sample_index) {key}; {len(missing)} missing, "
            f"{len(unasked)} unasked; the pipeline must score or quarantine every rollout"
        )


def _type(name: str) -> pa.DataType:
    return tables.KEEP.field(name).type


def _evenly(rows: int, count: int) -> npt.NDArray[np.uint8]:
    """[rows]: 1 at `count` places spread over the rows."""
    shown = np.zeros(rows, np.uint8)
    shown[np.linspace(0, rows - 1, min(count, rows)).round().astype(int)] = 1
    return shown


def _mean(values: FloatArray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else 0.0


def _shares(quadrant_N: npt.NDArray[np.uint8]) -> tuple[float, float, float, float]:
    counts = np.bincount(quadrant_N, minlength=5)[1:] / max(len(quadrant_N), 1)
    return float(counts[0]), float(counts[1]), float(counts[2]), float(counts[3])
