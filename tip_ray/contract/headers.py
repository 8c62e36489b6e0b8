"""What travels beside a table: a few numbers that the driver needs without holding the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tip_ray.contract.tables import Key

Tried = tuple[int, int, int]  # (slot, sample_index, attempt) of a step


@dataclass(frozen=True)
class Quarantined:
    """One rollout that no replica can process."""

    key: Key
    prompt_uid: str
    stage: str  # rollout | teacher
    reason: str


@dataclass(frozen=True)
class RolloutHeader:
    """Beside a ROLLOUTS table, row by row where a tuple."""

    keys: tuple[Key, ...]
    row_tokens: tuple[int, ...]  # prompt and response tokens
    response_tokens: tuple[int, ...]
    truncated: tuple[bool, ...]  # finished by length
    repeated_ngram_fraction: tuple[float, ...]  # of all 4-grams, those seen earlier in the row
    weight_version: int
    table_bytes: int
    busy_s: float  # engine seconds since the batch before
    quarantined: tuple[Quarantined, ...] = ()
    rewards: tuple[float, ...] = ()  # one a row where the spec has a reward.scorer


@dataclass(frozen=True)
class TeacherHeader:
    """Beside SCORES and TARGETS."""

    keys: tuple[Key, ...]
    loss_tokens: int
    student_mass_sum: float  # over loss tokens, of the student's probability on its top-K
    teacher_mass_sum: float  # over loss tokens, of the teacher's probability on those ids
    scores_bytes: int
    busy_s: float
    quarantined: tuple[Quarantined, ...] = ()


@dataclass(frozen=True)
class QuadrantThresholds:
    """Entropy (normalised) and divergence (nats) above which a token is high."""

    entropy: float
    divergence: float


@dataclass(frozen=True)
class SelectionHeader:
    """Beside KEEP: the step's distributions over loss tokens, in nats."""

    loss_tokens: int
    kept_tokens: int
    student_entropy_mean: float
    teacher_entropy_mean: float
    reverse_kl_mean: float
    reverse_kl_p98: float
    reverse_kl_max: float
    forward_kl_mean: float
    quadrant_shares: tuple[float, float, float, float]  # Q1..Q4, thresholds of this step
    frozen_shares: tuple[float, float, float, float]  # Q1..Q4, thresholds of step 1
    frozen_thresholds: QuadrantThresholds
    keep_bytes: int
    busy_s: float
    nothing_kept: tuple[Tried, ...] = ()  # rollouts that no rank gets to see
    weight_sum: float = 0.0  # of all kept tokens; 0: the step can teach nothing
    # The learner rank of each rollout, as in KEEP: what is cut for which rank.
    rank_of: Mapping[Key, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CutHeader:
    """Beside SAMPLES and one SELECTED table for each rank that was asked for."""

    selected_bytes: tuple[int, ...]  # of each, in the order asked for
    unpruned_bytes: int  # what SELECTED would weigh with every loss token kept
    busy_s: float


@dataclass(frozen=True)
class LearnerReport:
    """What one learner rank says of one step; loss and norm are already summed over ranks."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool  # non-finite loss or gradient: no update was made
    tokens: int  # this rank's input tokens, padding excluded
    kept: int  # this rank's kept tokens
    logprob_gap_sum: float  # over this rank's kept tokens: |recorded - learner's|, nats
    logprob_gap_max: float
    peak_bytes: int
    busy_s: float
    micro_batches: int = field(default=0)
    trained: tuple[Tried, ...] = ()  # the rollouts that this rank was given
