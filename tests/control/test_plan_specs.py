"""The shipped specs of the paper's pairs: what they say, and that their plan fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tip_ray.cli import main
from tip_ray.commands.begin import plan_lines
from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.spec_check import parse_spec
from tip_ray.control.plan import make_plan
from tip_ray.control.plan_devices import models_of
from tip_ray.control.plan_fit import check_fit
from tip_ray.control.spec_file import load_spec
from tip_ray.control.templates import TEMPLATES

JOB_SPECS = Path(__file__).parents[2] / "job_specs"
PAIRS = {  # teacher, student, learning rate, devices
    "qwen3-8b-to-4b-math": ("Qwen3-8B", "Qwen3-4B", 1e-6, 8),
    "qwen3-8b-to-4b-math-3gpu": ("Qwen3-8B", "Qwen3-4B", 1e-6, 3),
    "llama3-70b-to-8b-math": ("Llama-3.1-70B-Instruct", "Llama-3.1-8B-Instruct", 3e-7, 8),
    "qwen2.5-14b-to-1.5b-math": ("Qwen2.5-14B-Instruct", "Qwen2.5-1.5B-Instruct", 1e-6, 4),
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


@pytest.mark.parametrize("name", PAIRS)
def test_the_plan_is_whole_without_a_network_and_fits(name: str) -> None:
    spec, devices = pair(name), PAIRS[name][3]
    plan = make_plan(spec)
    assert (plan.gpus, plan.unknown) == (devices, ())
    check_fit(spec, models_of(spec))
    assert [pool.name for pool in plan.memory] == ["rollout", "teacher", "learner"]
    assert plan.step_seconds == pytest.approx(sum(plan.seconds.values()))
    assert plan.weight_sync_bytes is not None
    assert plan.object_store_bytes is not None
    shipped = sum(hop.bytes_a_step or 0 for hop in plan.hops)
    assert plan.object_store_bytes > shipped + 2 * plan.weight_sync_bytes
    assert not any("known once" in line for line in plan_lines(plan))


def refusal(name: str, changes: dict[str, Any]) -> SpecError:
    spec = load_spec(JOB_SPECS / f"{name}.yaml", changes)
    with pytest.raises(SpecError) as caught:
        check_fit(spec, models_of(spec))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "field", "cure"),
    [
        ({"learner.replicas": 1}, "learner.replicas", "set learner.replicas to 2"),
        (
            {"learner.gradient_checkpointing": False},
            "learner.gradient_checkpointing",
            "set learner.gradient_checkpointing to True",
        ),
        (
            {"learner.micro_batch_tokens": 131072},
            "learner.micro_batch_tokens",
            "set learner.micro_batch_tokens to 10240",
        ),
        ({"teacher.num_gpus": 1}, "teacher.num_gpus", "set teacher.num_gpus to 2"),
        (
            {"rollout.gpu_memory_utilization": 0.1},
            "rollout.gpu_memory_utilization",
            "set rollout.gpu_memory_utilization to 0.9",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_smallest_change(
    changes: dict[str, Any], field: str, cure: str
) -> None:
    error = refusal("llama3-70b-to-8b-math", changes)
    assert error.field == field
    assert cure in error.cure
    name, value = cure.removeprefix("set ").split(" to ")
    cured = load_spec(
        JOB_SPECS / "llama3-70b-to-8b-math.yaml", changes | {name: yaml.safe_load(value)}
    )
    check_fit(cured, models_of(cured))


def test_other_devices_are_said_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(JOB_SPECS / "llama3-70b-to-8b-math.yaml", {"teacher.num_gpus": 1})
    monkeypatch.setenv("TIP_RAY_DEVICE_GB", "192")
    check_fit(spec, models_of(spec))
    monkeypatch.setenv("TIP_RAY_DEVICE_GB", "24")
    assert "at most 24.0 GB of a GPU of 24 GB" in str(refusal("llama3-70b-to-8b-math", {}))
    for wrong in ("much", "0", "-3", "nan"):
        monkeypatch.setenv("TIP_RAY_DEVICE_GB", wrong)
        assert refusal("llama3-70b-to-8b-math", {}).field == "TIP_RAY_DEVICE_GB"


def test_a_model_that_is_not_known_is_named_and_nothing_is_guessed() -> None:
    spec = load_spec(JOB_SPECS / "qwen3-8b-to-4b-math.yaml", {"teacher.model": "org/name"})
    plan = make_plan(spec)
    assert plan.unknown == ("teacher.model",)
    assert [pool.name for pool in plan.memory] == ["rollout", "learner"]
    assert (plan.step_seconds, list(plan.seconds)) == (None, ["rollout", "learner"])
    said = [line for line in plan_lines(plan) if line.startswith("teacher.model:")]
    assert len(said) == 1
    assert "give a local directory" in said[0]
    check_fit(spec, models_of(spec))


def test_the_learners_peak_hardly_follows_the_retention() -> None:
    path = JOB_SPECS / "qwen3-8b-to-4b-math-3gpu.yaml"
    peaks = [
        make_plan(load_spec(path, {"selection.retention": kept})).memory[-1].total_bytes / 1e9
        for kept in (1.0, 0.5, 0.2, 0.1)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks == pytest.approx([71.93, 71.85, 71.80, 71.79], abs=0.02)  # as in RESULTS.md


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_init_writes_fits(template: str) -> None:
    spec = parse_spec(yaml.safe_load(TEMPLATES[template]))
    check_fit(spec, models_of(spec))


def test_a_teacher_on_vllm_has_the_engines_share_and_room_for_a_row() -> None:
    path = JOB_SPECS / "llama3-70b-to-8b-math.yaml"
    on_vllm = {"teacher.engine": "vllm", "teacher.num_gpus": 4, "teacher.tensor_parallel": 4}
    teacher = make_plan(load_spec(path, on_vllm)).memory[1]
    assert teacher.limit_bytes == pytest.approx(0.92 * 80e9)
    assert teacher.parts["KV cache"] == 10240 * 2 * 80 * 1024 * 2 / 4
    two = {"teacher.num_gpus": 2, "teacher.tensor_parallel": 2}
    # 3 would do, but does not divide 8 key and value heads.
    assert "teacher.tensor_parallel to 4 and" in str(refusal(path.stem, on_vllm | two))


def test_validate_shows_the_plan_and_refuses_before_a_model_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(JOB_SPECS / "llama3-70b-to-8b-math.yaml")
    assert main(["validate", path, "--set", "teacher.num_gpus=1"]) == 2
    out, err = capsys.readouterr()
    assert any(line.split()[:2] == ["teacher", "147"] for line in out.splitlines())
    assert err.count("\n") == 1
    assert "set teacher.num_gpus to 2" in err
