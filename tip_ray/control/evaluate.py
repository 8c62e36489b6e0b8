"""Evaluation through the rollout pool: the same engines, weights and rule of one version."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from tip_ray.contract import tables
from tip_ray.contract.run_state import EvaluationResult
from tip_ray.contract.spec import EvaluationSpec
from tip_ray.runtime.pool import Pool
from tip_ray.runtime.tasks import together


class Evaluator:
    """Runs the spec's evaluations.

    Args:
        problems: PROMPTS by entry name, one row a response.
        last_step: every entry is evaluated after it.
    """

    def __init__(
        self,
        pool: Pool,
        entries: Sequence[EvaluationSpec],
        problems: Mapping[str, pa.Table],
        last_step: int,
    ) -> None:
        self._pool, self._entries, self._problems = pool, entries, problems
        self._last_step = last_step

    async def run_due(self, step: int) -> list[EvaluationResult]:
        """Results of the entries that are due after `step`: before the first, every n, the last."""
        due = [
            entry
            for entry in self._entries
            if step % entry.every_steps == 0 or step == self._last_step
        ]
        return [await self._run(entry, step) for entry in due]

    async def _run(self, entry: EvaluationSpec, step: int) -> EvaluationResult:
        began = time.monotonic()
        table = self._problems[entry.name]
        shards = np.array_split(np.arange(table.num_rows), len(self._pool))
        parts = await together(
            *(self._answer(table.take(rows), entry) for rows in shards if len(rows))
        )
        answers = tables.concat([one for part in parts for one in part], tables.ANSWERS)
        return summarize(entry, step, answers, time.monotonic() - began)

    async def _answer(self, problems: pa.Table, entry: EvaluationSpec) -> list[pa.Table]:
        """ANSWERS of one replica's share, as they come; what is lost is asked for again."""
        answers: list[pa.Table] = []

        def remaining() -> tuple[pa.Table, EvaluationSpec] | None:
            done = {key for part in answers for key in tables.keys(part)}
            rows = [row for row, key in enumerate(tables.keys(problems)) if key not in done]
            return (problems.take(rows), entry) if rows else None

        async for answer in self._pool.stream("evaluate", remaining):
            answers.append(answer.header)  # noqa: PERF401 - remaining() looks meanwhile
        return answers


def summarize(
    entry: EvaluationSpec, step: int, answers: pa.Table, seconds: float
) -> EvaluationResult:
    """mean@samples with its standard error over problems, pass@samples, lengths."""
    scores = tables.column(answers, "score").astype(np.float64)
    _, problem = np.unique(tables.column(answers, "slot"), return_inverse=True)
    means = np.bincount(problem, scores) / np.bincount(problem)
    spread = means.std(ddof=1) if len(means) > 1 else 0.0
    best = np.zeros(len(means))
    np.maximum.at(best, problem, scores)
    return EvaluationResult(
        name=entry.name,
        step=step,
        samples=entry.samples,
        problems=len(means),
        mean=float(means.mean()),
        standard_error=float(spread / np.sqrt(len(means))),
        pass_any=float((best > 0).mean()),
        response_tokens_mean=float(tables.column(answers, "response_tokens").mean()),
        truncated_fraction=float(tables.column(answers, "truncated").mean()),
        seconds=seconds,
    )
