"""The shipped specs of the paper's pairs: what they say, and that their plan fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tip_ray.contract.spec import RunSpec
from tip_ray.contract.spec_check import parse_spec
from tip_ray.control.spec_file import load_spec

JOB_SPECS = Path(__file__).parents[2] / "job_specs"
PAIRS = {  # teacher, student, learning rate, most devices
    "qwen3-8b-to-4b-math": ("Qwen3-8B", "Qwen3-4B", 1e-6, 8),
    "qwen3-8b-to-4b-math-4gpu": ("Qwen3-8B", "Qwen3-4B", 1e-6, 4),
    "llama3-70b-to-8b-math": ("Llama-3.1-70B-Instruct", "Llama-3.1-8B-Instruct", 3e-7, 8),
    "qwen2.5-14b-to-1.5b-math": ("Qwen2.5-14B-Instruct", "Qwen2.5-1.5B-Instruct", 1e-6, 8),
}


def pair(name: str) -> RunSpec:
    return load_spec(JOB_SPECS / f"{name}.yaml")


def test_every_math_spec_is_pinned_here() -> None:
    assert {path.stem for path in JOB_SPECS.glob("*math*.yaml")} == set(PAIRS)


@pytest.mark.parametrize("path", sorted(JOB_SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_spec_is_read_the_same_both_ways(path: Path) -> None:
    assert parse_spec(yaml.safe_load(path.read_text())) == load_spec(path)


@pytest.mark.parametrize("name", PAIRS)
def test_the_papers_hyper_parameters(name: str) -> None:
    spec, (teacher, student, lr, _) = pair(name), PAIRS[name]
    assert (spec.teacher.model.split("/")[1], spec.student.model.split("/")[1]) == (
        teacher,
        student,
    )
    learner, rollout = spec.learner, spec.rollout
    assert (learner.lr, learner.schedule, learner.weight_decay) == (lr, "cosine", 0.0)
    assert (spec.prompts.prompts_per_step, rollout.samples_per_prompt) == (8, 16)
    assert (rollout.max_prompt_tokens, rollout.max_response_tokens) == (2048, 8192)
    assert (rollout.temperature, rollout.top_p, spec.max_lag) == (1.0, 1.0, 0)
    assert (spec.selection.rule, spec.selection.retention) == ("soft_or", 0.5)
    assert (spec.loss.kind, spec.loss.normalize) == ("reverse_kl", "rollout")


@pytest.mark.parametrize("name", PAIRS)
def test_the_papers_evaluations(name: str) -> None:
    found = {
        one.name: (one.samples, one.temperature, one.max_response_tokens, one.scorer)
        for one in pair(name).evaluation
    }
    assert found == dict.fromkeys(("math-500", "aime24", "aime25"), (16, 1.0, 8192, "math"))


@pytest.mark.parametrize("name", PAIRS)
def test_each_pool_has_a_worker_group_of_its_own(name: str) -> None:
    spec = pair(name)
    asked = [dict(pool.resources) for pool in (spec.rollout, spec.teacher, spec.learner)]
    assert asked == [{"tip_rollout": 1}, {"tip_teacher": 1}, {"tip_learner": 1}]
