"""Run directories with made-up contents, as a driver would have written them."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from tip_ray.contract.run_state import EvaluationResult, RunState, RunStatus, StepMetrics
from tip_ray.control.run_directory import SAMPLES_WITH_TEXT, RunDirectory
from tip_ray.control.spec_file import load_spec

QUICKSTART = Path(__file__).parents[1] / "job_specs" / "quickstart.yaml"


def made_metrics(step: int, **changes: Any) -> StepMetrics:
    """A step's metrics; integers are 1 and floats 0.5 where nothing is given."""
    kinds = {name: field.annotation for name, field in StepMetrics.model_fields.items()}
    values = {name: 1 if kind is int else 0.5 for name, kind in kinds.items()}
    return StepMetrics.model_validate({**values, "step": step, **changes})


def made_status(run_id: str, **changes: Any) -> RunStatus:
    """A status that has just been written."""
    now = time.time()
    times = {"started_at": now, "updated_at": now, "heartbeat_at": now}
    values = {"run_id": run_id, "name": "made", "steps": 40, **times}
    return RunStatus.model_validate({**values, **changes})


def made_evaluation(step: int, mean: float, name: str = "carry") -> EvaluationResult:
    return EvaluationResult(
        name=name,
        step=step,
        samples=1,
        problems=256,
        mean=mean,
        standard_error=0.03,
        pass_any=mean,
        response_tokens_mean=25.0,
        truncated_fraction=0.0,
        seconds=1.0,
    )


def made_samples(step: int, texts: list[list[str]], seed: int = 0) -> pa.Table:
    """One rollout for each list of token strings; every second token is kept."""
    rng = random.Random(seed)
    rows = []
    for slot, text in enumerate(texts):
        m = len(text)
        values = [rng.random() for _ in range(m)]
        top_ids, top_logprobs = [[0, 1, 2, 3, 4]] * m, [[-0.1, -2.0, -3.0, -4.0, -5.0]] * m
        rows.append(
            {
                "step": step,
                "slot": slot,
                "sample_index": 0,
                "attempt": 0,
                "prompt_uid": f"uid-{slot}",
                "prompt_ids": [1, 2],
                "response_ids": list(range(m)),
                "loss_mask": [1] * m,
                **dict.fromkeys(("student_entropy", "teacher_entropy", "reverse_kl"), values),
                **dict.fromkeys(("forward_kl", "student_logprob", "teacher_logprob"), values),
                "kept": [index % 2 for index in range(m)],
                "quadrant": [1 + index % 4 for index in range(m)],
                **dict.fromkeys(("student_top_ids", "teacher_top_ids"), top_ids),
                **dict.fromkeys(("student_top_logprobs", "teacher_top_logprobs"), top_logprobs),
                "weight_version": step - 1,
                "finish_reason": "stop",
                "text": text,
                "prompt_text": "27+18=",
                **dict.fromkeys(("student_top_text", "teacher_top_text"), [list("01234")] * m),
            }
        )
    return pa.Table.from_pylist(rows, schema=SAMPLES_WITH_TEXT)


def made_run(root: Path | str, run_id: str, *, steps: int = 12, **overrides: Any) -> RunDirectory:
    """A run of the quickstart that has succeeded."""
    spec = load_spec(QUICKSTART, {"steps": steps, **overrides})
    directory = RunDirectory.create(str(root), run_id, spec)
    for step in range(1, steps + 1):
        left = math.exp(-step / 8)
        directory.append_metrics(made_metrics(step, loss=0.3 * left, reverse_kl_mean=0.2 * left))
    directory.write_evaluation(made_evaluation(0, 0.42))
    directory.write_evaluation(made_evaluation(steps, 0.95))
    for step in (1, steps):
        directory.write_samples(step, made_samples(step, [list("7+8+0=15"), list("*45")]))
    directory.write_status(
        made_status(
            run_id,
            steps=steps,
            step=steps,
            state=RunState.SUCCEEDED,
            accuracy=0.95,
            initial_accuracy=0.42,
            kept_fraction=spec.selection.retention,
            bytes_shipped=250_000 * steps,
            bytes_unpruned=500_000 * steps,
            loss=0.02,
        )
    )
    return directory
