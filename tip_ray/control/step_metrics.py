"""What the stages' headers say of one step -> one row of metrics/."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tip_ray.contract.headers import (
    CutHeader,
    LearnerReport,
    RolloutHeader,
    SelectionHeader,
    TeacherHeader,
)
from tip_ray.contract.run_state import StepMetrics
from tip_ray.contract.spec import RunSpec
from tip_ray.runtime.weights import WeightVersion


@dataclass
class StepTrace:
    """Filled along the step's path; seconds are wall time unless a header says busy."""

    step: int
    spec: RunSpec
    rollouts: list[RolloutHeader] = field(default_factory=list)
    teachers: list[TeacherHeader] = field(default_factory=list)
    selection: SelectionHeader | None = None
    cuts: list[CutHeader] = field(default_factory=list)
    reports: list[LearnerReport] = field(default_factory=list)
    weights: WeightVersion | None = None
    quarantined: int = 0
    seconds_learner_waiting: float = 0.0
    seconds_publish: float = 0.0
    seconds_evaluation: float = 0.0
    seconds_step: float = 0.0


def step_metrics(trace: StepTrace) -> StepMetrics:
    """One row; stage seconds are busy time, averaged over the pool's replicas."""
    assert trace.selection is not None
    assert trace.weights is not None
    selection, reports = trace.selection, trace.reports
    learner_s = max(report.busy_s for report in reports)
    learner_tokens = sum(report.tokens for report in reports)
    version = min((header.weight_version for header in trace.rollouts), default=trace.step - 1)
    return StepMetrics(
        step=trace.step,
        time=time.time(),
        loss=reports[0].loss,
        learning_rate=reports[0].learning_rate,
        grad_norm=reports[0].grad_norm,
        update_skipped=int(reports[0].skipped),
        rollouts_quarantined=trace.quarantined,
        tokens_scored=sum(header.loss_tokens for header in trace.teachers),
        tokens_kept=selection.kept_tokens,
        kept_fraction=selection.kept_tokens / max(selection.loss_tokens, 1),
        learner_tokens=learner_tokens,
        learner_tokens_per_s=learner_tokens / max(learner_s, 1e-9),
        student_entropy_mean=selection.student_entropy_mean,
        teacher_entropy_mean=selection.teacher_entropy_mean,
        reverse_kl_mean=selection.reverse_kl_mean,
        reverse_kl_p98=selection.reverse_kl_p98,
        reverse_kl_max=selection.reverse_kl_max,
        forward_kl_mean=selection.forward_kl_mean,
        weight_version=version,
        lag=trace.step - 1 - version,
        seconds_rollout=sum(h.busy_s for h in trace.rollouts) / trace.spec.rollout.replicas,
        seconds_teacher=sum(h.busy_s for h in trace.teachers) / trace.spec.teacher.replicas,
        seconds_selector=selection.busy_s,
        seconds_cut=sum(header.busy_s for header in trace.cuts),
        seconds_learner=learner_s,
        seconds_publish=trace.seconds_publish,
        seconds_evaluation=trace.seconds_evaluation,
        seconds_learner_waiting=trace.seconds_learner_waiting,
        seconds_step=trace.seconds_step,
        learner_peak_bytes=max(report.peak_bytes for report in reports),
        **_quadrants(selection),
        **_bytes(trace, selection, trace.weights),
        **_responses(trace.rollouts),
        **_support(trace.teachers),
        **_logprob_gap(reports),
    )


def _quadrants(selection: SelectionHeader) -> dict[str, float]:
    own = {f"q{i}_share": x for i, x in enumerate(selection.quadrant_shares, start=1)}
    frozen = {f"frozen_q{i}_share": x for i, x in enumerate(selection.frozen_shares, start=1)}
    return {**own, **frozen}


def _bytes(trace: StepTrace, selection: SelectionHeader, weights: WeightVersion) -> dict[str, int]:
    return {
        "bytes_rollout_to_teacher": sum(header.table_bytes for header in trace.rollouts),
        "bytes_teacher_to_selector": sum(header.scores_bytes for header in trace.teachers),
        "bytes_selector_to_cut": selection.keep_bytes,
        "bytes_cut_to_learner": sum(sum(header.selected_bytes) for header in trace.cuts),
        "bytes_unpruned_to_learner": sum(header.unpruned_bytes for header in trace.cuts),
        "bytes_weight_sync": weights.nbytes * trace.spec.rollout.replicas,
    }


def _responses(headers: list[RolloutHeader]) -> dict[str, float | int]:
    lengths = [length for header in headers for length in header.response_tokens]
    truncated = sum(sum(header.truncated) for header in headers)
    repeated = sum(sum(header.repeated_ngram_fraction) for header in headers)
    rows = max(len(lengths), 1)
    return {
        "rollouts": len(lengths),
        "tokens_generated": sum(lengths),
        "response_length_mean": sum(lengths) / rows,
        "response_length_max": max(lengths, default=0),
        "truncated_fraction": truncated / rows,
        "eos_fraction": (len(lengths) - truncated) / rows,
        "repeated_ngram_fraction": repeated / rows,
    }


def _support(headers: list[TeacherHeader]) -> dict[str, float | int]:
    tokens = max(sum(header.loss_tokens for header in headers), 1)
    return {
        "student_mass_on_support": sum(h.student_mass_sum for h in headers) / tokens,
        "teacher_mass_on_support": sum(h.teacher_mass_sum for h in headers) / tokens,
    }


def _logprob_gap(reports: list[LearnerReport]) -> dict[str, float]:
    kept = max(sum(report.kept for report in reports), 1)
    return {
        "logprob_gap_mean": sum(report.logprob_gap_sum for report in reports) / kept,
        "logprob_gap_max": max(report.logprob_gap_max for report in reports),
    }
