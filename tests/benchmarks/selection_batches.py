"""Scored rollouts of the initial student (or another's), and what a rule makes of them.

N  response tokens of a batch    B  rows    T  padded inputs of a row    K  ids of a support
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tests.benchmarks.selection_runs import Arm, Settings
from tip_ray.compute.packing import pad_right, to_tensor
from tip_ray.compute.selection import loss_weights, normalised_entropy, select_weighted
from tip_ray.contract import tables
from tip_ray.contract.spec import RunSpec, SelectionSpec
from tip_ray.control.preflight import Preflight, preflight
from tip_ray.stages.rollout import RolloutActor
from tip_ray.stages.teacher import TeacherActor

SHUFFLE_SEED = 77  # prompts and rollouts that no training run of the study has seen


@dataclass(frozen=True)
class Selection:
    """An arm, with or without inverse inclusion weights."""

    arm: Arm
    reweight: str = "none"

    @property
    def spec(self) -> SelectionSpec:
        if self.arm.rule == "all":
            return SelectionSpec(rule="all")
        return SelectionSpec.model_validate(
            {
                "rule": self.arm.rule,
                "retention": self.arm.retention,
                "reweight": self.reweight,
            }
        )


@dataclass(frozen=True)
class Batch:
    """Scored rollouts of one step."""

    entropy_N: npt.NDArray[np.float64]  # normalised
    reverse_kl_N: npt.NDArray[np.float32]
    forward_kl_N: npt.NDArray[np.float32]
    row_offsets: npt.NDArray[np.int64]
    row_keys: Sequence[tables.Key]
    input_ids_BT: Tensor
    rows_N: Tensor  # into the flattened [B * T]: the inputs that predict the response tokens
    support_ids_NK: Tensor
    teacher_logprobs_NK: Tensor
    teacher_tail_N: Tensor

    def coefficients(self, selection: Selection, seed: int) -> Tensor:
        """float32 [N]: what each token's divergence weighs in the loss, 0 where dropped."""
        keep_N, weight_N = select_weighted(
            selection.spec,
            self.entropy_N,
            self.reverse_kl_N,
            self.forward_kl_N,
            self.row_offsets,
            seed,
            row_keys=self.row_keys,
        )
        return torch.from_numpy(
            loss_weights(
                keep_N,
                weight_N,
                self.row_offsets,
                "token",
                divide_by="all" if selection.reweight == "inclusion" else "kept",
            )
        )


class Sampler:
    """Rollout and teacher actor in this process, for a student's weights at `path`."""

    def __init__(self, spec: RunSpec, checked: Preflight, path: str) -> None:
        facts = checked.facts
        longest = spec.rollout.max_prompt_tokens + spec.rollout.max_response_tokens
        self._spec, self._checked = spec, checked
        self._rollout = RolloutActor(
            spec.student,
            spec.rollout,
            model_path=path,
            vocab_size=facts.vocab_size,
            k=facts.support_k,
            eos_ids=facts.eos_ids,
            max_model_tokens=longest,
            seed=SHUFFLE_SEED,
        )
        self._teacher = TeacherActor(
            spec.teacher,
            facts.teacher_path,
            facts.vocab_size,
            facts.support_k,
            spec.support_source,
            spec.loss.tail_floor_nats,
            longest,
        )

    def batch(self, step: int) -> Batch:
        """The rollouts of the next prompts, scored."""
        prompts = self._checked.source.take(step, self._spec.prompts.prompts_per_step)
        parts = list(self._rollout.generate(prompts))[1::2]
        rollouts = tables.concat(parts, tables.rollouts_schema(self._checked.facts.support_k))
        _, scores, targets = self._teacher.score(rollouts)
        return _batch(rollouts, scores, targets, self._checked.facts.vocab_size)


def _batch(rollouts: pa.Table, scores: pa.Table, targets: pa.Table, vocab_size: int) -> Batch:
    ends = tables.offsets(rollouts, "response_ids")
    prompts = rollouts.column("prompt_ids").to_pylist()
    responses = rollouts.column("response_ids").to_pylist()
    rows = [
        np.asarray([*prompt, *response[:-1]])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    input_ids_BT = pad_right(rows)
    width = input_ids_BT.shape[1]
    places = [
        row * width + len(prompt) - 1 + np.arange(b - a)
        for row, (prompt, (a, b)) in enumerate(zip(prompts, pairwise(ends), strict=True))
    ]
    return Batch(
        normalised_entropy(tables.column(scores, "student_entropy"), vocab_size),
        tables.column(scores, "reverse_kl"),
        tables.column(scores, "forward_kl"),
        ends,
        tables.keys(scores),
        input_ids_BT,
        torch.from_numpy(np.concatenate(places)),
        to_tensor(tables.column(targets, "support_ids"), torch.int64),
        to_tensor(tables.column(targets, "teacher_logprobs")),
        to_tensor(tables.column(targets, "teacher_tail_logprob")),
    )


def divergence_kept(
    settings: Settings, arms: Sequence[Arm], *, batches: int = 8
) -> list[dict[str, Any]]:
    """The share of the initial student's reverse KL that lies on the tokens which a rule keeps."""
    spec = settings.spec(Arm("all", 1.0), SHUFFLE_SEED)
    checked = preflight(spec)
    sampler = Sampler(spec, checked, checked.facts.student_path)
    scored = [sampler.batch(step) for step in range(1, batches + 1)]
    total = sum(float(batch.reverse_kl_N.sum()) for batch in scored)
    rows = []
    for arm in arms:
        kept = sum(
            float(batch.reverse_kl_N[batch.coefficients(Selection(arm), number).numpy() > 0].sum())
            for number, batch in enumerate(scored)
        )
        rows.append({"rule": arm.rule, "retention": arm.retention, "divergence_kept": kept / total})
    return rows
