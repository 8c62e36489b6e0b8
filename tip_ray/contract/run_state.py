"""What a run is doing: its state and legal transitions, its status, and the numbers of a step."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from tip_ray.contract.errors import TransitionError

STALE_AFTER_S = 15.0  # a heartbeat comes every HEARTBEAT_S; three missed ones are suspicious
LOST_AFTER_S = 120.0
HEARTBEAT_S = 4.0

Health = Literal["live", "stale", "lost", "ended"]


class RunState(StrEnum):
    PENDING = "PENDING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        return self in (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)


_ENDS = frozenset({RunState.FAILED, RunState.CANCELLED})
TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    RunState.PENDING: frozenset({RunState.STARTING}) | _ENDS,
    RunState.STARTING: frozenset({RunState.RUNNING}) | _ENDS,
    RunState.RUNNING: frozenset({RunState.RECOVERING, RunState.SUCCEEDED}) | _ENDS,
    RunState.RECOVERING: frozenset({RunState.RUNNING}) | _ENDS,
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset({RunState.STARTING}),
    RunState.CANCELLED: frozenset({RunState.STARTING}),
}


def check_transition(old: RunState, new: RunState) -> None:
    """Raises TransitionError unless a run may go from `old` to `new`."""
    if new not in TRANSITIONS[old]:
        legal = ", ".join(sorted(TRANSITIONS[old])) or "none: it is final"
        raise TransitionError(f"run state: {old} -> {new} is illegal, legal: {legal}")


class RunStatus(BaseModel):
    """status.json: flat, one writer (the driver), replaced atomically."""

    model_config = ConfigDict(extra="ignore")

    run_id: str
    name: str
    state: RunState = RunState.PENDING
    epoch: int = 1
    """Incarnation of the driver that writes; the lease against a second one."""
    driver: str = ""
    """Tells two drivers of one epoch apart."""
    job_id: str | None = None
    """Submission id of the Ray job whose process the driver is; None where it is no job's."""
    step: int = 0
    """Steps trained and published."""
    steps: int
    started_at: FiniteFloat
    """Seconds since 1970 of the first start."""
    updated_at: FiniteFloat
    """Seconds since 1970 of the last change."""
    heartbeat_at: FiniteFloat
    """Seconds since 1970 of the driver's last sign of life."""
    error: str | None = None
    exit_code: int | None = None
    """Of the driver's process, where its state alone does not tell."""
    waiting_for: str | None = None
    """What a STARTING or RECOVERING run waits for."""
    loss: float | None = None
    accuracy: float | None = None
    """mean@samples of the first evaluation, a fraction."""
    initial_accuracy: float | None = None
    kept_fraction: float | None = None
    tokens_generated: int = 0
    tokens_kept: int = 0
    bytes_shipped: int = 0
    """Bytes that travelled from cut to the learners, all steps."""
    bytes_unpruned: int = 0
    """What that hop would have carried with every token kept."""
    weight_version: int = 0
    learner_tokens_per_s: float | None = None
    prompts_skipped: int = 0
    rollouts_quarantined: int = 0
    updates_skipped: int = 0
    recoveries: int = 0

    def health_at(self, now: float) -> Health:
        """From the heartbeat's age: a silent run is never shown as simply RUNNING."""
        if self.state.ended:
            return "ended"
        age_s = now - self.heartbeat_at
        return "live" if age_s < STALE_AFTER_S else "stale" if age_s < LOST_AFTER_S else "lost"


class ObservedStatus(RunStatus):
    """A status as someone saw it at one moment: what clients get and the status API sends."""

    health: Health
    heartbeat_age_s: float
    """Never negative: two machines' clocks may differ."""


def observe(status: RunStatus, now: float) -> ObservedStatus:
    """`status` as it looks at `now`, in seconds since 1970."""
    health, age_s = status.health_at(now), max(0.0, now - status.heartbeat_at)
    return ObservedStatus(**{**dict(status), "health": health, "heartbeat_age_s": age_s})


class StepMetrics(BaseModel):
    """One row of metrics/: everything that is worth a curve. Divergences and entropies in nats."""

    model_config = ConfigDict(extra="forbid")

    step: int
    time: float
    """Seconds since 1970 at which the step ended."""
    # What was learned
    loss: float
    learning_rate: float
    grad_norm: float
    update_skipped: int = 0
    # Tokens
    rollouts: int
    rollouts_quarantined: int = 0
    tokens_generated: int
    tokens_scored: int
    tokens_kept: int
    kept_fraction: float
    learner_tokens: int
    """Input tokens that the learner's trunk read, padding excluded."""
    learner_tokens_per_s: float
    # Bytes at each hop, and what an unpruned hop would have carried
    bytes_rollout_to_teacher: int
    bytes_teacher_to_selector: int
    bytes_selector_to_cut: int
    bytes_cut_to_learner: int
    bytes_unpruned_to_learner: int
    bytes_weight_sync: int
    # Distributions over the step's loss tokens
    student_entropy_mean: float
    teacher_entropy_mean: float
    reverse_kl_mean: float
    reverse_kl_p98: float
    reverse_kl_max: float
    forward_kl_mean: float
    student_mass_on_support: float
    teacher_mass_on_support: float
    q1_share: float
    q2_share: float
    q3_share: float
    q4_share: float
    frozen_q1_share: float
    """Shares by the thresholds of step 1."""
    frozen_q2_share: float
    frozen_q3_share: float
    frozen_q4_share: float
    logprob_gap_mean: float
    """Mean |recorded - learner's| log-probability of the kept sampled tokens."""
    logprob_gap_max: float
    # Responses
    response_length_mean: float
    response_length_max: int
    truncated_fraction: float
    eos_fraction: float
    repeated_ngram_fraction: float
    """Of all 4-grams of a response, those seen earlier in it; mean over responses."""
    # Versions and time
    weight_version: int
    """The version that the step's rollouts were made with."""
    lag: int
    seconds_rollout: float
    seconds_teacher: float
    seconds_selector: float
    seconds_cut: float
    seconds_learner: float
    seconds_publish: float
    seconds_evaluation: float = 0.0
    seconds_learner_waiting: float
    """How long the learner stood idle before the step's tokens arrived."""
    seconds_step: float
    """Wall time since the step before ended."""
    learner_peak_bytes: int
    """Peak resident (CPU) or allocated (GPU) memory, the largest over ranks."""


class EvaluationResult(BaseModel):
    """One evaluation entry at one weight version."""

    name: str
    step: int
    samples: int
    problems: int
    mean: float
    """mean@samples, a fraction."""
    standard_error: float
    """Of `mean`, over problems."""
    pass_any: float
    """pass@samples: the fraction of problems with at least one right response."""
    response_tokens_mean: float
    truncated_fraction: float
    seconds: float
