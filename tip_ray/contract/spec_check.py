"""A plain mapping as a RunSpec, or one line that says what is wrong with it.

Fields are checked by their types; here is what takes more than one field to see, and how a problem
reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import SCORERS, RunSpec, TeacherSpec


def parse_spec(raw: Mapping[str, Any]) -> RunSpec:
    """`raw` as a RunSpec.

    Raises:
        SpecError: unknown key, value out of range or of another type, fields that do not fit.
    """
    if not isinstance(raw, Mapping):
        raise SpecError("spec", repr(raw)[:60], "a mapping of fields", "see `tip-ray init`")
    try:
        spec = RunSpec.model_validate(raw)
    except ValidationError as error:
        raise _spec_error(error) from None
    _refuse_engine_mismatch(spec.teacher)
    _refuse_weights_without_rewards(spec)
    _refuse_support_of_hidden(spec)
    if spec.loss.kind == "policy_gradient":
        _refuse_biased_gradient(spec)
    return spec


def _refuse_engine_mismatch(teacher: TeacherSpec) -> None:
    """Fields of the teacher that its engine would ignore, or that exclude one another."""
    path, size = "teacher.tensor_parallel", str(teacher.tensor_parallel)
    if teacher.engine == "transformers":
        cure = "set teacher.engine to vllm"
        if teacher.tensor_parallel > 1:
            raise SpecError(path, size, "1 with engine transformers", cure)
        if teacher.engine_args:
            found = _short(teacher.engine_args)
            raise SpecError("teacher.engine_args", found, "nothing with engine transformers", cure)
    elif teacher.num_gpus and teacher.num_gpus != teacher.tensor_parallel:
        expected = f"{teacher.num_gpus}, as teacher.num_gpus"
        raise SpecError(path, size, expected, "engine vllm uses every GPU of its replica")


def _refuse_weights_without_rewards(spec: RunSpec) -> None:
    loss, samples = spec.loss, spec.rollout.samples_per_prompt
    needs = "loss.reward_weight" if loss.reward_weight else "loss.sample_weight pass_rate"
    if spec.reward.scorer is None and (loss.reward_weight or loss.sample_weight != "none"):
        cure = f"it is {needs} that needs one"
        raise SpecError("reward.scorer", "null", f"{' | '.join(SCORERS)}, or your own", cure)
    if loss.sample_weight == "pass_rate" and samples < 2:
        expected = "at least 2 with loss.sample_weight pass_rate"
        raise SpecError("rollout.samples_per_prompt", str(samples), expected)


def _refuse_support_of_hidden(spec: RunSpec) -> None:
    """A support that nothing would be compared on; `support.k` stays, for the scores."""
    if spec.teacher.targets == "hidden" and spec.support.source != "auto":
        found, expected = repr(spec.support.source), "auto with teacher.targets hidden"
        cure = "its loss is on the whole vocabulary; or set teacher.targets to topk"
        raise SpecError("support.source", found, expected, cure)


def _refuse_biased_gradient(spec: RunSpec) -> None:
    """What makes the expected gradient of policy_gradient another one.

    So would a rule that looks at the sampled token; no rule is given it.
    """
    cure = "its ratio and advantage are of what was sampled at temperature 1"
    for path, value in (
        ("rollout.temperature", spec.rollout.temperature),
        ("rollout.top_p", spec.rollout.top_p),
    ):
        if value != 1:
            raise SpecError(path, str(value), "1 with loss.kind policy_gradient", cure)
    if spec.teacher.targets != "topk":
        expected = "topk with loss.kind policy_gradient"
        raise SpecError("teacher.targets", repr(spec.teacher.targets), expected)


def _spec_error(error: ValidationError) -> SpecError:
    """The first problem as one line; unknown keys first, since they explain missing ones."""
    problems = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    problem = problems[0]
    path = _dotted(problem["loc"])
    more = f"{len(problems) - 1} more problem(s) after this one" if len(problems) > 1 else ""
    kind = problem["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, problem["loc"], more)
    if kind == "missing":
        return SpecError(path, "nothing", "a value: the field is required", more)
    expected = str(problem["msg"]).removeprefix("Value error, ")
    expected = expected.replace("Input should be ", "").replace("String should ", "a string to ")
    return SpecError(path or "spec", _short(problem["input"]), expected, more)


def _unknown_key(path: str, location: tuple[str | int, ...], more: str) -> SpecError:
    known = list(fields_of(location[:-1]))
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    expected = f"{near[0]!r}" if near else f"one of {', '.join(known)}"
    cure = f"did you mean {near[0]}?" if near else "remove it"
    return SpecError(path, "an unknown key", expected, f"{cure} {more}".strip())


def fields_of(location: tuple[str | int, ...] | list[str]) -> dict[str, FieldInfo]:
    """The fields of the section at `location` ("learner",) of a RunSpec; empty if it has none."""
    section: type[BaseModel] = RunSpec
    for name in location:
        if isinstance(name, int):
            continue
        field = section.model_fields.get(name)
        inner = _section_in(field.annotation) if field else None
        if inner is None:
            return {}
        section = inner
    return dict(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_in(argument)
        if found is not None:
            return found
    return None


def _dotted(location: tuple[str | int, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
