"""The spec: every field with its default, and what is refused."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
import yaml

from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.spec_check import fields_of, parse_spec

# Every field of a spec with its default; required ones and list entries with some value.
EVERYTHING = """
name: carry-quickstart
seed: 0
run_root: runs
steps: 40
max_lag: 1
student: {model: "demo:carry-student", revision: null, dtype: bfloat16, trust_remote_code: false}
teacher:
  model: "demo:carry-teacher"
  revision: null
  dtype: bfloat16
  trust_remote_code: false
  engine: transformers
  targets: topk
  max_batch_tokens: 8192
  chunk_rows: 512
  replicas: 1
  num_cpus: 1
  num_gpus: 0
  tensor_parallel: 1
  resources: {}
  engine_args: {}
support: {k: 16, source: auto}
rollout:
  engine: vllm
  replicas: 1
  num_cpus: 1
  num_gpus: 0
  tensor_parallel: 1
  resources: {}
  samples_per_prompt: 4
  max_prompt_tokens: 16
  max_response_tokens: 48
  temperature: 1.0
  top_p: 1.0
  gpu_memory_utilization: 0.9
  engine_args: {}
prompts:
  source: "demo:carry"
  prompts_per_step: 32
  field: problem
  answer_field: answer
  chat: null
  shuffle: true
  limit: null
  too_long: skip
  allow_template_mismatch: false
selection: {rule: soft_or, retention: 0.5, scope: rollout, keep_at_least: 1, clip_divergence: false,
  reweight: none, quadrant_quantiles: [0.5, 0.9]}
loss: {kind: reverse_kl, normalize: token, beta: 0.5, clip: 0.2, reward_weight: 0.0,
  sample_weight: none, tail_floor_nats: -30.0}
reward: {scorer: null}
learner:
  replicas: 1
  num_cpus: 1
  num_gpus: 0
  resources: {}
  micro_batch_tokens: 4096
  gradient_checkpointing: false
  lr: 3.0e-4
  schedule: cosine
  warmup_steps: 0
  min_lr: 0.0
  weight_decay: 0.0
  betas: [0.9, 0.999]
  eps: 1.0e-8
  grad_clip: 1.0
checkpoint: {every_steps: 10, keep: 2}
evaluation:
  - {name: carry, source: "demo:carry-eval", every_steps: 10, samples: 1, temperature: 0.0,
     max_response_tokens: 48, limit: 256, scorer: exact}
samples_per_step: 4
tracking: []
faults: {max_tries: 3, item_timeout_s: 600, max_quarantined_fraction: 0.01,
  max_learner_restarts: 5, max_skipped_updates: 5, placement_timeout_s: 600}
"""
REQUIRED = {
    "name": "a",
    "steps": 1,
    "student": {"model": "a"},
    "teacher": {"model": "b"},
    "prompts": {"source": "c.jsonl"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    raw = yaml.safe_load(EVERYTHING)
    *sections, name = path.split(".")
    place = raw
    for section in sections:
        place = place[int(section)] if section.isdecimal() else place[section]
    place[name] = value
    return raw


def refusal(raw: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_spec(raw)
    assert "\n" not in str(caught.value)
    return caught.value


def test_everything_is_every_field() -> None:
    def same_keys(raw: dict[str, Any], section: pydantic.BaseModel) -> None:
        assert set(raw) == set(type(section).model_fields)
        for name, value in raw.items():
            inner = getattr(section, name)
            if isinstance(inner, pydantic.BaseModel):
                same_keys(value, inner)

    raw = yaml.safe_load(EVERYTHING)
    spec = parse_spec(raw)
    same_keys(raw, spec)
    same_keys(raw["evaluation"][0], spec.evaluation[0])


def test_everything_but_the_required_is_the_default() -> None:
    raw = yaml.safe_load(EVERYTHING)
    for path in ("name", "steps", "evaluation"):
        del raw[path]
    least = {
        "name": "carry-quickstart",
        "steps": 40,
        **{name: {"model": raw[name]["model"]} for name in ("student", "teacher")},
        "prompts": {"source": "demo:carry"},
    }
    assert parse_spec(least) == parse_spec({"name": "carry-quickstart", "steps": 40, **raw})


@pytest.mark.parametrize("path", ["name", "steps", "student", "student.model", "prompts.source"])
def test_required_fields_are_required(path: str) -> None:
    raw = yaml.safe_load(EVERYTHING)
    section, _, name = path.rpartition(".")
    del (raw[section] if section else raw)[name]
    assert refusal(raw).field == path


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("learner.learning_rate", 1, "one of replicas"),
        ("learner.warmup_step", 1, "did you mean warmup_steps?"),
        ("stepps", 1, "did you mean steps?"),
        ("evaluation.0.sample", 1, "did you mean samples?"),
        ("steps", 0, "greater than or equal to 1"),
        ("steps", "many", "a valid integer"),
        ("steps", 1.5, "integer"),
        ("name", "Carry", "pattern"),
        ("name", "a" * 41, "at most 40"),
        ("selection.retention", 0, "greater than 0"),
        ("selection.retention", 1.1, "less than or equal to 1"),
        ("selection.rule", "softor", "one of all, entropy"),
        ("selection.rule", "rules.py:best rule", "package.module:function"),
        ("selection.quadrant_quantiles", [0.5], "quadrant_quantiles"),
        ("loss.kind", "kl", "'reverse_kl'"),
        ("reward.scorer", "right", "one of exact, last_number, math"),
        ("evaluation.0.scorer", "maths", "package.module:function"),
        ("loss.tail_floor_nats", 0.0, "less than 0"),
        ("student.dtype", "int8", "'bfloat16'"),
        ("learner.lr", float("nan"), "finite"),
        ("learner.min_lr", 1.0, "min_lr at most lr"),
        ("learner.num_gpus", 2, "less than or equal to 1"),
        ("learner.betas", [0.9, 1.0], "less than 1"),
        ("teacher.num_gpus", 0.5, "integer"),
        ("rollout.top_p", 0, "greater than 0"),
        ("rollout.resources", {"teacher": 0}, "greater than 0"),
    ],
)
def test_wrong_values_are_refused_by_name(path: str, value: Any, says: str) -> None:
    error = refusal(changed(path, value))
    assert says in str(error)
    assert path.rpartition(".")[2] in str(error)


def test_two_evaluations_of_one_name_are_refused() -> None:
    raw = yaml.safe_load(EVERYTHING)
    raw["evaluation"] *= 2
    assert "names that differ" in str(refusal(raw))


def test_an_unknown_key_is_named_before_what_it_leaves_missing() -> None:
    raw = yaml.safe_load(EVERYTHING)
    raw["student"]["modell"] = raw["student"].pop("model")
    error = refusal(raw)
    assert error.field == "student.modell"
    assert "did you mean model?" in str(error)
    assert "1 more problem" in str(error)


@pytest.mark.parametrize(
    ("teacher", "field", "cure"),
    [
        ({"tensor_parallel": 2}, "teacher.tensor_parallel", "set teacher.engine to vllm"),
        ({"engine_args": {"max_num_seqs": 4}}, "teacher.engine_args", "set teacher.engine to vllm"),
        ({"engine": "vllm", "num_gpus": 2}, "teacher.tensor_parallel", "every GPU"),
        (
            {"engine": "vllm", "num_gpus": 1, "tensor_parallel": 2},
            "teacher.tensor_parallel",
            "expected 1, as teacher.num_gpus",
        ),
    ],
)
def test_what_the_teachers_engine_cannot_do(teacher: dict[str, Any], field: str, cure: str) -> None:
    error = refusal({**REQUIRED, "teacher": {**REQUIRED["teacher"], **teacher}})
    assert error.field == field
    assert cure in str(error)


@pytest.mark.parametrize(
    "teacher",
    [
        {"engine": "vllm"},
        {"engine": "vllm", "tensor_parallel": 2, "num_cpus": 2},
        {"engine": "vllm", "tensor_parallel": 2, "num_gpus": 2},
        {"num_gpus": 2},
    ],
)
def test_what_the_teachers_engine_can_do(teacher: dict[str, Any]) -> None:
    parse_spec({**REQUIRED, "teacher": {**REQUIRED["teacher"], **teacher}})


def test_rule_all_takes_no_retention() -> None:
    assert parse_spec({**REQUIRED, "selection": {"rule": "all"}}).selection.retention == 1.0
    error = refusal({**REQUIRED, "selection": {"rule": "all", "retention": 0.5}})
    assert "no retention with rule all" in str(error)


def test_inclusion_needs_a_rule_that_draws() -> None:
    for rule in ("entropy_sample", "random"):
        selection = {"rule": rule, "reweight": "inclusion"}
        assert parse_spec({**REQUIRED, "selection": selection}).selection.keep_at_least == 0
        selection["keep_at_least"] = 1
        assert "keep_at_least 0" in str(refusal({**REQUIRED, "selection": selection}))
    for rule in ("all", "soft_or", "q3", "package.module:function"):
        error = refusal({**REQUIRED, "selection": {"rule": rule, "reweight": "inclusion"}})
        assert error.field == "selection.reweight"
        assert "entropy_sample | random" in str(error)


def test_weights_by_reward_need_rewards() -> None:
    for field, value in (("reward_weight", 2.0), ("sample_weight", "pass_rate")):
        raw = {**REQUIRED, "loss": {field: value}}
        error = refusal(raw)
        assert error.field == "reward.scorer"
        assert f"loss.{field}" in str(error)
        parse_spec({**raw, "reward": {"scorer": "package.module:function"}})
    alone = {**raw, "reward": {"scorer": "exact"}, "rollout": {"samples_per_prompt": 1}}
    assert refusal(alone).field == "rollout.samples_per_prompt"


def test_policy_gradient_needs_samples_of_the_student_itself() -> None:
    raw = {**REQUIRED, "loss": {"kind": "policy_gradient"}}
    assert parse_spec(raw).selected_width(16) == 1
    for field, value in (("temperature", 0.7), ("top_p", 0.9)):
        error = refusal({**raw, "rollout": {field: value}})
        assert error.field == f"rollout.{field}"
        assert "1 with loss.kind policy_gradient" in str(error)


def test_hidden_targets_take_no_support_and_no_policy_gradient() -> None:
    raw = {**REQUIRED, "teacher": {**REQUIRED["teacher"], "targets": "hidden"}}
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        assert parse_spec({**raw, "loss": {"kind": kind}}).teacher.targets == "hidden"
    assert parse_spec({**raw, "support": {"k": 4}}).support.k == 4  # of the scores
    for source in ("student", "teacher", "union"):
        error = refusal({**raw, "support": {"source": source}})
        assert error.field == "support.source"
        assert "auto with teacher.targets hidden" in str(error)
    error = refusal({**raw, "loss": {"kind": "policy_gradient"}})
    assert error.field == "teacher.targets"
    assert "topk with loss.kind policy_gradient" in str(error)


def test_a_spec_is_frozen() -> None:
    spec = parse_spec(REQUIRED)
    with pytest.raises(pydantic.ValidationError):
        spec.steps = 2
    with pytest.raises(pydantic.ValidationError):
        spec.learner.lr = 1.0


@pytest.mark.parametrize("raw", [None, [], "name: a", 3])
def test_a_spec_is_a_mapping(raw: Any) -> None:
    assert "a mapping of fields" in str(refusal(raw))


@pytest.mark.parametrize(
    ("loss", "source", "resolved"),
    [
        ("reverse_kl", "auto", "student"),
        ("policy_gradient", "auto", "student"),
        ("forward_kl", "auto", "teacher"),
        ("jsd", "auto", "union"),
        ("reverse_kl", "union", "union"),
    ],
)
def test_the_support_follows_the_loss(loss: str, source: str, resolved: str) -> None:
    raw = {**REQUIRED, "loss": {"kind": loss}, "support": {"source": source}}
    spec = RunSpec.model_validate(raw)
    assert spec.support_source == resolved
    if loss != "policy_gradient":
        assert spec.selected_width(8) == (16 if resolved == "union" else 8)


def test_the_schema_has_a_line_for_every_section() -> None:
    schema = RunSpec.model_json_schema()
    assert set(schema["properties"]) == set(RunSpec.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["SelectionSpec"]["properties"]["retention"]["description"]
    assert set(fields_of(["learner"])) == set(schema["$defs"]["LearnerSpec"]["properties"])
