"""Everything that can be wrong with a spec and is cheap to find out, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tip_ray.compute.rules import find_rule
from tip_ray.compute.scorers import scorer
from tip_ray.contract.spec import EvaluationSpec, RunSpec
from tip_ray.control.plan_devices import models_of
from tip_ray.control.plan_fit import check_fit
from tip_ray.control.trackers import check_trackers
from tip_ray.stages.models import load_tokenizer
from tip_ray.stages.pair_checks import (
    PairFacts,
    check_pair,
    describe_first_prompt,
    with_weights,
)
from tip_ray.stages.prompts import PromptSource, evaluation_prompts


@dataclass(frozen=True)
class Preflight:
    """What the checks read on the way, for the driver to use."""

    facts: PairFacts
    tokenizer: PreTrainedTokenizerBase
    source: PromptSource
    problems: dict[str, pa.Table]  # PROMPTS by evaluation name
    first_prompt: list[str]  # lines to print


def preflight(spec: RunSpec) -> Preflight:
    """Check models, tokenizers, prompts and evaluations of `spec`; starts nothing.

    Weights are neither read nor downloaded.

    Raises:
        UserError: one line with field, found, expected and cure.
    """
    check_trackers(spec)
    find_rule(spec.selection.rule)
    for field, name in _scorers(spec).items():
        scorer(name, field)
    facts = check_pair(spec)
    tokenizer = load_tokenizer(facts.student_path, spec.student.trust_remote_code, "student.model")
    theirs = load_tokenizer(facts.teacher_path, spec.teacher.trust_remote_code, "teacher.model")
    source = PromptSource(
        spec.prompts,
        max_prompt_tokens=spec.rollout.max_prompt_tokens,
        samples_per_prompt=spec.rollout.samples_per_prompt,
        seed=spec.seed,
        tokenizer=tokenizer,
        teacher_tokenizer=theirs,
        answers_required=spec.reward.scorer is not None,
    )
    problems = {entry.name: _problems(spec, entry, tokenizer) for entry in spec.evaluation}
    return Preflight(facts, tokenizer, source, problems, _first_prompt(source, tokenizer, facts))


def ready_to_start(spec: RunSpec) -> Preflight:
    """Refuse what does not fit its devices or is wrong otherwise, then download the weights.

    Raises:
        UserError: one line with field, found, expected and cure.
    """
    check_fit(spec, models_of(spec))
    checked = preflight(spec)
    facts = checked.facts
    # Again: now their configs say what models are that the spec names only.
    check_fit(spec, models_of(spec, facts.student_path, facts.teacher_path))
    return replace(checked, facts=with_weights(spec, facts))


def _scorers(spec: RunSpec) -> dict[str, str]:
    """Names of scorers by the field that asks for them."""
    named = {f"evaluation[{i}].scorer": entry.scorer for i, entry in enumerate(spec.evaluation)}
    return named if spec.reward.scorer is None else {"reward.scorer": spec.reward.scorer, **named}


def _problems(spec: RunSpec, entry: EvaluationSpec, tokenizer: Any) -> pa.Table:
    return evaluation_prompts(
        entry,
        spec.prompts,
        max_prompt_tokens=spec.rollout.max_prompt_tokens,
        tokenizer=tokenizer,
    )


def _first_prompt(source: PromptSource, tokenizer: Any, facts: PairFacts) -> list[str]:
    """One prompt of step 1 as the engines will read it, with its stop ids."""
    cursor = source.cursor
    row = source.take(1, 1).slice(0, 1).to_pylist()[0]
    source.seek(cursor)
    return describe_first_prompt(
        tokenizer, row["prompt_ids"], facts.eos_ids, row["teacher_prompt_ids"]
    )
