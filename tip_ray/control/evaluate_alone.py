"""Evaluation without a run: the rollout pool on a Ray of its own, one model, no training."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from tip_ray.contract.errors import SpecError
from tip_ray.contract.run_state import EvaluationResult
from tip_ray.contract.spec import RunSpec
from tip_ray.control.crew import make_rollout_pool
from tip_ray.control.evaluate import Evaluator
from tip_ray.control.placement import demand
from tip_ray.control.signals import stopped_by_signals
from tip_ray.runtime.cluster import connected, refuse_what_never_fits, release, reserve
from tip_ray.stages.models import load_config, load_tokenizer, whole_checkpoint
from tip_ray.stages.pair_checks import PairFacts, eos_ids_of
from tip_ray.stages.prompts import evaluation_prompts

_log = logging.getLogger(__name__)


def evaluate_alone(spec: RunSpec, step: int) -> list[EvaluationResult]:
    """All evaluations of `spec` with `spec.student` as it stands; its teacher is not read.

    Args:
        step: what the results say they were made after.

    Raises:
        SpecError: no evaluation in the spec, or the model or the problems cannot be read.
        PlacementError: there is no room for the rollout pool.
        RunFailedError: a replica could not be made, or an evaluation failed.
    """
    if not spec.evaluation:
        cure = "e.g. [{name: test, source: test.jsonl, scorer: last_number}]"
        raise SpecError("evaluation", "an empty list", "at least one entry", cure)
    facts = _student_facts(spec)
    tokenizer = load_tokenizer(facts.student_path, spec.student.trust_remote_code, "student.model")
    problems = {
        entry.name: evaluation_prompts(
            entry,
            spec.prompts,
            max_prompt_tokens=spec.rollout.max_prompt_tokens,
            tokenizer=tokenizer,
        )
        for entry in spec.evaluation
    }
    cpus = spec.rollout.num_cpus * spec.rollout.replicas
    with connected(None, num_cpus=cpus, namespace=f"{spec.name}-eval"):
        return asyncio.run(_evaluate(spec, facts, problems, step))


async def _evaluate(
    spec: RunSpec, facts: PairFacts, problems: dict[str, Any], step: int
) -> list[EvaluationResult]:
    bundles = {"rollout": demand(spec)["rollout"]}
    with stopped_by_signals():
        refuse_what_never_fits(bundles)
        groups = await reserve(bundles, timeout_s=spec.faults.placement_timeout_s)
        pool = make_rollout_pool(spec, facts, groups, _tell)
        try:
            await pool.start()
            # Every entry is due after the last step.
            return await Evaluator(pool, spec.evaluation, problems, last_step=step).run_due(step)
        finally:
            pool.close()
            release(groups)


def _student_facts(spec: RunSpec) -> PairFacts:
    """What the rollout pool needs to know; the student stands in for the teacher."""
    student = spec.student
    path = whole_checkpoint(student.model, student.revision, "student.model")
    config = load_config(path, student.trust_remote_code, "student.model")
    tokenizer = load_tokenizer(path, student.trust_remote_code, "student.model")
    eos_ids = eos_ids_of(path, config, tokenizer)
    if not eos_ids:
        cure = "set eos_token_id in its generation_config.json"
        raise SpecError("student.model", f"{student.model} without an EOS id", "one", cure)
    pad_id = tokenizer.pad_token_id
    return PairFacts(
        student_path=path,
        teacher_path=path,
        vocab_size=config.vocab_size,
        support_k=min(spec.support.k, config.vocab_size),
        teacher_hidden=config.hidden_size,
        eos_ids=eos_ids,
        pad_id=eos_ids[0] if pad_id is None else pad_id,
        template_differs=False,
    )


def _tell(kind: str, **facts: Any) -> None:
    _log.warning("%s: %s", kind, facts)
