"""Real rollouts for benchmarks, and a model's own view of them, without a pipeline.

N  response tokens of a table, row after row        D  hidden width        V  shared vocabulary
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tests.benchmarks.memory import in_fresh_process
from tip_ray.compute.selection import normalised_entropy, select
from tip_ray.contract import tables
from tip_ray.contract.spec import RunSpec, SelectionSpec, TeacherSpec
from tip_ray.control.preflight import preflight
from tip_ray.control.spec_file import load_spec

SPECS = Path(__file__).parents[2] / "job_specs"
# What is compared of two sides' scores: the kept sets of these rules.
RULES = (("soft_or", 0.5), ("soft_or", 0.1), ("divergence", 0.5), ("divergence", 0.1))
RULES += (("q3", 0.5), ("q3", 0.1))


def parser(summary: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks on SmolLM2 have."""
    made = argparse.ArgumentParser(description=summary)
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--models", type=Path, default=Path("models/smollm2"))
    made.add_argument("--problems", type=Path, default=Path("data"))
    return made


def absent(options: argparse.Namespace) -> Path | None:
    """The first thing that is needed and not there."""
    models = [options.models / name / "config.json" for name in ("teacher", "student")]
    needed = [*models, options.problems / "gsm8k_train.jsonl"]
    return next((one for one in needed if not one.exists()), None)


def smollm2_spec(options: argparse.Namespace, overrides: Mapping[str, Any]) -> RunSpec:
    """The job spec of SmolLM2 on GSM8K, with this machine's files and `overrides`."""
    files = {
        "student.model": str(options.models / "student"),
        "teacher.model": str(options.models / "teacher"),
        "prompts.source": str(options.problems / "gsm8k_train.jsonl"),
        "prompts.limit": 1000,
    }
    return load_spec(SPECS / "smollm2-gsm8k-cpu.yaml", files | dict(overrides))


def rollouts(spec: RunSpec, steps: int) -> list[pa.Table]:
    """ROLLOUTS of steps 1 to `steps`, all of the initial student.

    In a process of its own: an engine keeps process groups and threads for good.
    """
    return in_fresh_process(_rollouts, spec, steps)


def _rollouts(spec: RunSpec, steps: int) -> list[pa.Table]:
    from tip_ray.stages.rollout import RolloutActor

    ready = preflight(spec)
    facts, longest = ready.facts, spec.rollout.max_prompt_tokens + spec.rollout.max_response_tokens
    actor = RolloutActor(
        spec.student,
        spec.rollout,
        facts.student_path,
        facts.vocab_size,
        facts.support_k,
        facts.eos_ids,
        longest,
        spec.seed,
    )
    made = []
    for step in range(1, steps + 1):
        stream = list(actor.generate(ready.source.take(step, spec.prompts.prompts_per_step)))
        table = tables.concat(stream[1::2], tables.rollouts_schema(facts.support_k))
        made.append(tables.newest_attempts(table))  # by key: engines finish in any order
    return made


@torch.inference_mode()
def hidden_states(
    path: str | Path, dtype: str, table: pa.Table, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(hidden_ND, head_VD) of the model at `path` in `dtype`, for all response tokens."""
    from tip_ray.stages.engines.trunk import Row
    from tip_ray.stages.engines.trunk_transformers import TransformersTrunk

    spec = TeacherSpec(model=str(path), dtype=dtype, max_batch_tokens=2048)
    trunk = TransformersTrunk(spec, str(path), vocab_size)
    prompts, responses = (table.column(name).to_pylist() for name in ("prompt_ids", "response_ids"))
    rows = [
        Row(np.array([*prompt, *response[:-1]], np.int64), len(response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    parts: dict[int, Tensor] = {}
    for places, hidden_ND in trunk.hidden_states(rows):
        split = hidden_ND.split([rows[place].response_tokens for place in places])
        parts |= dict(zip(places, split, strict=True))
    return torch.cat([parts[place] for place in range(len(rows))]), trunk.head_VD


class Scores:
    """One side's scores of some response tokens, in nats."""

    def __init__(
        self,
        entropy_N: npt.ArrayLike,
        reverse_kl_N: npt.ArrayLike,
        forward_kl_N: npt.ArrayLike,
        row_offsets: npt.ArrayLike,
        vocab_size: int,
    ) -> None:
        self.reverse_kl_N = np.asarray(reverse_kl_N, np.float64)
        self.forward_kl_N = np.asarray(forward_kl_N, np.float64)
        self._h_N = normalised_entropy(entropy_N, vocab_size)
        self._offsets = row_offsets

    def kept(self, rule: str, retention: float) -> npt.NDArray[np.bool_]:
        """[N] what the rule keeps of each rollout, the table being the step."""
        spec = SelectionSpec(rule=rule, retention=retention)
        return select(spec, self._h_N, self.reverse_kl_N, self.forward_kl_N, self._offsets)


def jaccards(one: Scores, other: Scores) -> dict[str, float]:
    """How far two sides keep the same tokens, by rule and retention: intersection over union."""
    found = {}
    for rule, retention in RULES:
        ours_N, theirs_N = one.kept(rule, retention), other.kept(rule, retention)
        union = int((ours_N | theirs_N).sum())
        found[f"{rule} {retention}"] = int((ours_N & theirs_N).sum()) / union
    return found
