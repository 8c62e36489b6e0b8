"""RunSpec: every field of a run, its range in its type, its meaning in its description.

The tree is frozen and refuses unknown keys. `spec_check.parse_spec` turns a plain mapping into a
RunSpec, or raises one line that says what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["bfloat16", "float16", "float32"]
SCORERS = ("exact", "last_number", "math")
USER_FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
Resources = dict[str, PositiveFloat]


def _known_scorer(name: str) -> str:
    if name not in SCORERS and not re.fullmatch(USER_FUNCTION, name):
        raise ValueError(f"one of {', '.join(SCORERS)} or package.module:function")
    return name


Scorer = Annotated[str, AfterValidator(_known_scorer)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StudentSpec(_Section):
    model: str
    """A path, a hub id, any fsspec URL, or demo:carry-student."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    dtype: Dtype = "bfloat16"
    """Compute type of rollouts and learner, and of the export; master weights stay float32."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you trust its author."""


class TeacherSpec(_Section):
    model: str
    """A path, a hub id, any fsspec URL, or demo:carry-teacher."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    dtype: Dtype = "bfloat16"
    """Type of the teacher's weights and trunk; its log-softmax is always float32."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you trust its author."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the trunk; the head is ours in both."""
    targets: Literal["topk", "hidden"] = "topk"
    """What travels for kept tokens: topk, log-probabilities on a support; or hidden, the teacher's
    last hidden state in bfloat16: the loss is exact on the whole vocabulary, for 2 bytes times the
    teacher's width a token, and the learner ranks hold the teacher's head, sharded over them."""
    max_batch_tokens: PositiveInt = 8192
    """Padded tokens in one forward; a longer row travels alone."""
    chunk_rows: PositiveInt = 512
    """Rows of full-vocabulary logits alive at once."""
    replicas: PositiveInt = 1
    num_cpus: PositiveInt = 1
    """CPUs of one replica."""
    num_gpus: NonNegativeInt = 0
    """GPUs of one replica; above 1 the model is spread over them."""
    tensor_parallel: PositiveInt = 1
    """Devices that engine vllm spreads the model over; on GPUs all of the replica's."""
    resources: Resources = {}
    """Ray custom resources of one replica."""
    engine_args: dict[str, Any] = {}
    """Passed on to the engine, as it names them."""


class SupportSpec(_Section):
    k: PositiveInt = 16
    """Ids a token at which both models are compared; what is left is the tail bucket."""
    source: Literal["auto", "student", "teacher", "union"] = "auto"
    """Whose top-K the loss uses; auto follows the loss."""


class RolloutSpec(_Section):
    engine: Literal["vllm", "transformers"] = "vllm"
    replicas: PositiveInt = 1
    num_cpus: PositiveInt = 1
    """CPUs of one replica."""
    num_gpus: NonNegativeInt = 0
    """GPUs of one replica."""
    tensor_parallel: PositiveInt = 1
    resources: Resources = {}
    """Ray custom resources of one replica."""
    samples_per_prompt: PositiveInt = 4
    max_prompt_tokens: PositiveInt = 16
    """Longer prompts are skipped or refused: prompts.too_long."""
    max_response_tokens: PositiveInt = 48
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    """Sampling temperature; 0 is greedy. What is recorded is always at temperature 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a device that the engine may use."""
    engine_args: dict[str, Any] = {}
    """Passed on to the engine, as it names them."""


class ChatSpec(_Section):
    system: str | None = None
    """System message put before the problem."""
    template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, e.g. enable_thinking: false."""


class PromptsSpec(_Section):
    source: str
    """demo:carry, or a .jsonl / .parquet file at any fsspec URL."""
    prompts_per_step: PositiveInt = 32
    field: str = "problem"
    """Column with the prompt: a string, or a list of chat messages."""
    answer_field: str = "answer"
    """Column with the reference answer; may be absent where nothing scores it."""
    chat: ChatSpec | None = None
    """Render with the student's chat template; null: the prompt is taken as it stands."""
    shuffle: bool = True
    limit: PositiveInt | None = None
    """Use only the first rows of the source."""
    too_long: Literal["skip", "error"] = "skip"
    """What to do with prompts above rollout.max_prompt_tokens; skipped ones are counted."""
    allow_template_mismatch: bool = False
    """Let the teacher read prompts as its own chat template renders them."""


BUILTIN_RULES = (
    "all",
    "entropy",
    "entropy_sample",
    "divergence",
    "q3",
    "soft_or",
    "soft_or_bottom",
    "random",
    "prefix",
)


SAMPLING_RULES = ("entropy_sample", "random")


class SelectionSpec(_Section):
    rule: str = "soft_or"
    """Which tokens are kept; a name or package.module:function."""
    retention: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Fraction of loss tokens kept."""
    scope: Literal["rollout", "batch"] = "rollout"
    """Where the top is taken: in each rollout, or in the whole step."""
    keep_at_least: NonNegativeInt = 1
    """Tokens kept in each rollout that has any; 0 with reweight inclusion."""
    clip_divergence: bool = False
    """Clip the divergence at its 0.98 quantile before it is normalised."""
    reweight: Literal["none", "inclusion"] = "none"
    """Weight sampled tokens by their inverse inclusion probability: an unbiased mean over all."""
    quadrant_quantiles: tuple[Fraction, Fraction] = (0.5, 0.9)
    """Quantiles of entropy and divergence above which a token is high."""

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        if rule not in BUILTIN_RULES and not re.fullmatch(USER_FUNCTION, rule):
            raise ValueError(f"one of {', '.join(BUILTIN_RULES)} or package.module:function")
        return rule

    @model_validator(mode="before")
    @classmethod
    def _all_takes_no_retention(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("rule") == "all":
            if raw.get("retention", 1.0) != 1.0:
                raise ValueError("no retention with rule all; remove it, or choose another rule")
            return {**raw, "retention": 1.0}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _inclusion_keeps_by_draws(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("reweight") == "inclusion":
            return {"keep_at_least": 0, **raw}
        return raw

    @field_validator("reweight")
    @classmethod
    def _inclusion_fits(cls, reweight: str, info: ValidationInfo) -> str:
        if reweight == "inclusion":
            if info.data.get("rule", "random") not in SAMPLING_RULES:
                raise ValueError(f"none, or rule {' | '.join(SAMPLING_RULES)}: others draw nothing")
            if info.data.get("keep_at_least"):
                raise ValueError("none, or keep_at_least 0: its counts hold in expectation only")
        return reweight


class LossSpec(_Section):
    kind: Literal["reverse_kl", "forward_kl", "jsd", "policy_gradient"] = "reverse_kl"
    normalize: Literal["token", "rollout"] = "token"
    """Divide by the step's kept tokens, or average in each rollout and then over rollouts."""
    beta: Fraction = 0.5
    """Mixture weight of jsd."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Importance-ratio clip of policy_gradient: the ratio counts from 1 - clip to 1 + clip."""
    reward_weight: NonNegativeFloat = 0.0
    """Inverse temperature of the per-prompt softmax over rewards; 0: off."""
    sample_weight: Literal["none", "pass_rate"] = "none"
    """Weight rollouts by p (1 - p), p the pass rate of their prompt in the step."""
    tail_floor_nats: Annotated[float, Field(lt=0, allow_inf_nan=False)] = -30.0
    """Floor of both tails' log-mass."""


class RewardSpec(_Section):
    scorer: Scorer | None = None
    """exact | last_number | math | package.module:function."""


class LearnerSpec(_Section):
    replicas: PositiveInt = 1
    """FSDP2 ranks."""
    num_cpus: PositiveInt = 1
    """CPUs of one rank."""
    num_gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs of one rank."""
    resources: Resources = {}
    """Ray custom resources of one rank."""
    micro_batch_tokens: PositiveInt = 4096
    """Padded tokens in one forward; a longer row travels alone."""
    gradient_checkpointing: bool = False
    lr: PositiveFloat = 3.0e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: PositiveFloat = 1.0e-8
    grad_clip: PositiveFloat = 1.0
    """Maximum norm of the gradient."""

    @model_validator(mode="after")
    def _min_lr_below_lr(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr at most lr ({self.lr}), found {self.min_lr}")
        return self


class CheckpointSpec(_Section):
    every_steps: PositiveInt = 10
    keep: PositiveInt = 2
    """Checkpoints kept, newest first."""


class EvaluationSpec(_Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    source: str
    """As prompts.source; rows need the answer field."""
    every_steps: PositiveInt = 10
    """Beside the evaluations before the first step and after the last."""
    samples: PositiveInt = 1
    """Responses a problem."""
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    max_response_tokens: PositiveInt = 48
    limit: PositiveInt | None = None
    """Use only the first problems."""
    scorer: Scorer = "exact"
    """exact | last_number | math | package.module:function."""


class TrackerSpec(_Section):
    model_config = ConfigDict(frozen=True, extra="allow")
    kind: Literal["tensorboard", "wandb", "mlflow"]
    """Beside it the tool's own options: log_dir; project, entity, mode ...; experiment ..."""


class FaultsSpec(_Section):
    max_tries: PositiveInt = 3
    """Tries of one piece of work on pool replicas."""
    item_timeout_s: PositiveFloat = 600
    """A replica that reports no progress for this long is replaced."""
    max_quarantined_fraction: Fraction = 0.01
    """Of the step's rollouts; above it the run fails."""
    max_learner_restarts: NonNegativeInt = 5
    max_skipped_updates: PositiveInt = 5
    """Non-finite updates in a row before the run fails."""
    placement_timeout_s: PositiveFloat = 600
    """How long to wait for the cluster to make room."""


class RunSpec(_Section):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)]
    """Prefix of the run id; DNS-1035, at most 40 characters."""
    seed: NonNegativeInt = 0
    run_root: str = "runs"
    """Any fsspec URL; a run's files are under <run_root>/<run id>."""
    steps: PositiveInt
    max_lag: NonNegativeInt = 1
    """Steps a rollout's weights may be behind; 0 is strictly on-policy."""
    student: StudentSpec
    teacher: TeacherSpec
    support: SupportSpec = SupportSpec()
    rollout: RolloutSpec = RolloutSpec()
    prompts: PromptsSpec
    selection: SelectionSpec = SelectionSpec()
    loss: LossSpec = LossSpec()
    reward: RewardSpec = RewardSpec()
    learner: LearnerSpec = LearnerSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluation: tuple[EvaluationSpec, ...] = ()
    samples_per_step: NonNegativeInt = 4
    """Rollouts written to samples/ each step."""
    tracking: tuple[TrackerSpec, ...] = ()
    faults: FaultsSpec = FaultsSpec()

    @model_validator(mode="after")
    def _distinct_evaluations(self) -> Self:
        names = [entry.name for entry in self.evaluation]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluation names that differ, found {', '.join(names)}")
        return self

    @property
    def support_source(self) -> Literal["student", "teacher", "union"]:
        """Whose top-K the loss uses, with `auto` resolved by the loss."""
        if self.support.source != "auto":
            return self.support.source
        by_loss: dict[str, Literal["student", "teacher", "union"]] = {
            "forward_kl": "teacher",
            "jsd": "union",
        }
        return by_loss.get(self.loss.kind, "student")

    def selected_width(self, k: int) -> int:
        """Ids a kept token at which the learner compares, if the student's support has `k`; with
        teacher.targets topk."""
        if self.loss.kind == "policy_gradient":
            return 1  # the sampled token
        return 2 * k if self.support_source == "union" else k

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts.prompts_per_step * self.rollout.samples_per_prompt
